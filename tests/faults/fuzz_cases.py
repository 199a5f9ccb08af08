"""Configs nobody would write on purpose, and some that one might, drawn from a seed."""

import random
from typing import NamedTuple

from configs import base
from megabyte_jax import run_config
from tests import runs

KEYS = sorted(run_config.flatten(runs.tiny_config("stdlib")))
DEFAULTS = run_config.flatten(base.get_config())
NO_KEYS = (
    "optimizer model model.global_model data.split mesh seed.x seed.x.y nothing optimizer.rate x.y "
    "model.transformer.dim model.transformer __class__ optimizer.__init__ items train.items . a..b "
    "train. .train model[0] data.split['by'] é∑ train.batch_size.x data.image.depth"
).split()

# On the command line, where all is text.
TEXTS = (
    "nan inf -inf 1e999 -1e999 1e-300 1e30 -1e30 0 -0 -1 1 2 3 7 0.5 1.5 1e-8 True False None true "
    "0x10 1_000 1e3 ٣ ² x float32 bfloat16 float64 muon adam cosine none full scaled -- = , "
    "() (1,) [1,2] {'a':1} ((0,5),) ((0,'x'),) ((5,0),) ((0,5) (3,5,7) (0,) (True,) (1.5,) ((),) "
    "1+1 lambda:0 __import__('os') $(id) %s%n {seed} ../../etc /no/such /dev/null ~ tfds: tfds:x"
).split()
TEXTS += ["", " ", "\n", "x\ny", "\udcff\udc80", "\x1b[2J", "a" * 20_000, "é" * 300, "'", '"', "\\"]
TEXTS += [str(n) for n in (2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**20, 10**400)]
TEXTS += [
    "9" * 5000,
    "-" + "9" * 5000,
    "(" * 150,
    "[" * 9000,
    "(" * 90 + ")" * 90,
    "-" * 3000 + "1",
]

# In a config file, where it is Python.
VALUES = (
    "True", "False", "None", "-5", "0", "1", "3", "1.5", "10**20", "10**400", "-(10**5000)",
    "2**31", "float('nan')", "1e999", "-1e999", "1e-300", "1e30", "np.float32(3)",
    "np.float64('nan')",     "np.int64(3)", "np.arange(3)", "jnp_like", "'x'", "''",
    "'x' * 10**7", "'a\\0b'", "'\\ud800'",
    "'\\udcff'", "b'x'", "1j", "object()", "lambda: 0", "int", "set()", "{1: 2}", "{'a': 1}", "[]",
    "()", "(1, 'x')", "((0, 5),)", "((0, 'x'),)", "[[0, 5]]", "((5, 0),)", "((0, 2.0),)", "cycle()",
    "deep(list)", "deep(tuple)", "((0, 1),) * 10**5", "range(5)", "iter(())", "Decimal('NaN')",
    "Fraction(1, 3)", "ConfigDict()", "ConfigDict({'a': 1})", "placeholder(int)",
    "required_placeholder(int)", "FieldReference(3)", "FieldReference(1) / 0", "Liar()",
    "Strange(1)",
)  # fmt: skip
PRELUDE = """
import numpy as np
from decimal import Decimal
from fractions import Fraction
from ml_collections import ConfigDict, FrozenConfigDict, FieldReference
from ml_collections.config_dict import placeholder, required_placeholder
from tests import runs

class jnp_like: shape = ()
class Liar:
    def __repr__(self): raise RuntimeError("no")
    def __eq__(self, other): raise RuntimeError("no")
    __hash__ = None
class Strange(int):
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
def cycle():
    x = []
    x.append(x)
    return x
def deep(kind):
    x = kind()
    for _ in range(3000): x = kind([x])
    return x
def nested(n):
    x = {}
    for _ in range(n): x = {"a": x}
    return x
def tiny(): return runs.tiny_config("stdlib")
"""
RETURNS = (
    "None", "5", "'x'", "[]", "{}", "c.to_dict()", "c.to_json()", "ConfigDict()", "object()", "c",
    "FrozenConfigDict(c)", "(c,)", "ConfigDict", "c.model", "iter(())", "ConfigDict({'seed': 1})",
    "ConfigDict(nested(50))", "ConfigDict(nested(3000))", "Liar()", "NotImplemented",
    "nested(3000)",
    "type('T', (), {'to_dict': 1, 'lock': lambda self: 0})()",
)  # fmt: skip
RAISES = (
    "1 / 0", "raise ValueError('x')", "raise ValueError", "raise KeyError('x')", "{}['x']",
    "nothing_of_this_name", "raise SystemExit(3)", "raise SystemExit", "raise OSError('x')",
    "raise ImportError('x')", "import no_such_module", "raise MemoryError", "assert 0",
    "f = lambda: f(); f()",
    "raise StopIteration", "raise UnicodeDecodeError('x', b'', 0, 1, 'y')", "raise Exception",
    "raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()", "open('/no/such')",
    "raise ValueError('x\\ny\\n\\n')", "raise RuntimeError('é' * 9999)", "c.nothing",
    "c.nothing = 1",     "c.seed = 'x'", "c.train = 5", "del c.seed.x", "raise NotImplementedError",
    "raise TypeError(c)",
)  # fmt: skip
SOURCES = (
    "", "x", "def", "\0", "\ud800", "get_config = 5", "def get_config(): pass",
    "raise ValueError(1)", "def get_config(a, b): return a", 
    "def get_config(): yield 1",
    "import sys; sys.exit(0)", "(" * 300, "from configs import nothing", "class get_config: pass",
    "x = '" + "a" * 10**6 + "'", "1 / 0", "#" * 10**6,
    "def get_config():\n\treturn 1\n        return 2",
)  # fmt: skip


class Case(NamedTuple):
    """Arguments of train.py.

    Attributes:
        arguments: that say the config; `FILE` in them stands for that of `source`.
        source: of a config file.
        names: of which an error names one; empty where nothing but the file can be named.
    """

    arguments: list[str]
    source: str
    names: list[str]


def plausible(key: str, rng: random.Random) -> object:
    """A value that may well be accepted, and often the first or the last that is."""
    default = DEFAULTS.get(key, run_config.flatten(runs.tiny_config("stdlib"))[key])
    known = {
        "optimizer.learning_rate": [1e-12, 1e-3, 1.0, 10],
        "optimizer.weight_decay": [0, 1, 100],
        "optimizer.eps": [1e-16, 1e-8, 1],
        "optimizer.b1": [0, 0.5, 0.99999],
        "optimizer.b2": [0, 0.5, 0.99999],
        "optimizer.clip_norm": [1e-6, 1e9],
        "optimizer.end_fraction": [0, 0.5, 0.999],
        "optimizer.name": ["adamw", "muon"],
        "optimizer.schedule": ["linear", "cosine", "constant"],
        "optimizer.state_dtype": ["float32", "bfloat16"],
        "optimizer.warmup_steps": [0, 1, 5],
        "train.num_steps": [1, 6, 2**31 - 1],
        "train.batch_size": [2, 4, 8],
        "train.grad_accumulation": [1, 2, 4],
        "train.skip": ["()", "((0,5),)", "((1,2),(0,2147483647))"],
        "seed": [0, 1, 2**32 - 1],
        "model.seq_len": [4, 8, 24, 96],
        "model.patch_size": [1, 2, 4, 8],
        "model.cross_patch": [-1, 0, 1, 4],
        "model.conv_kernels": ["()", "(3,)", "(1,3,5)"],
        "model.group_size": [0, 1, 2, 3, 6],
        "model.init": ["paper", "scaled"],
        "model.dtype": ["float32", "bfloat16"],
        "model.param_dtype": ["float32", "bfloat16"],
        "sample.temperature": [0, 1e-3, 1e3],
        "guard.policy": ["abort", "skip_update", "rollback_skip"],
    }
    stack = {
        "dim": [8, 16, 24, 48],
        "num_layers": [1, 2, 3],
        "num_heads": [1, 2, 4],
        "head_dim": [0, 1, 2, 6],
        "num_kv_heads": [0, 1, 2],
        "mlp_dim": [0, 1, 40],
        "norm": ["layernorm", "rmsnorm"],
        "activation": ["relu", "relu2", "gelu", "swiglu"],
        "dropout": [0.0, 0.5, 0.99],
        "remat": ["none", "dots", "full"],
        "scan_unroll": [1, 2, 4095],
    }
    choices = known.get(key) or (key.startswith("model.") and stack.get(key.split(".")[-1]))
    if choices:
        return rng.choice(choices)
    if isinstance(default, bool):
        return rng.choice([True, False])
    if isinstance(default, (int, float)):
        return rng.choice([default, default * 2, default + 1, 1, 2, 0])
    return default


def _overrides(rng: random.Random) -> Case:
    arguments, names = [], []
    wild = rng.random() < 0.8
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        # Each model takes a second to trace.
        keys = KEYS if wild or rng.random() < 0.1 else [k for k in KEYS if k[:6] != "model."]
        key = rng.choice(keys) if rng.random() < 0.93 else rng.choice(NO_KEYS)
        names.append(key)
        if key in KEYS and not (wild and rng.random() < (0.97 if key[:6] == "model." else 0.6)):
            value = str(plausible(key, rng))
        else:
            value = rng.choice(TEXTS)
        form = rng.random()
        if form < 0.9:
            arguments.append(f"--config.{key}={value}")
        elif form < 0.95:
            arguments += [f"--config.{key}", value]
        else:
            arguments.append(
                rng.choice(["--noconfig.{}", "--config.{}", "-config.{}=1"]).format(key)
            )
    whole = ["FILE"] * 8 + ["configs/quickstart.py", "configs/base.py", "configs/transformer.py"]
    whole += ["configs/million.py:text_tiny", "configs/million.py:" + rng.choice(TEXTS)]
    config = rng.choice(whole)
    if config.endswith(".py") or config == "FILE" or config.endswith("tiny"):
        return Case([f"--config={config}", *arguments], config_file(["pass"], "c"), names)
    return Case([f"--config={config}", *arguments], "", [])


def config_file(statements: list[str], returned: str) -> str:
    """A config file that changes the tiny config of the tests by some statements."""
    lines = [PRELUDE, "def get_config():", "    c = tiny()"]
    for statement in statements:
        lines += [f"    {line}" for line in statement.split("\n")]
    return "\n".join([*lines, f"    return {returned}", ""])


def _config_file(rng: random.Random) -> Case:
    kind = rng.random()
    if kind < 0.04:
        return Case(["--config=FILE"], rng.choice(SOURCES), [])
    if kind < 0.1:
        return Case(["--config=FILE"], config_file([rng.choice(RAISES)], "c"), [])
    if kind < 0.16:
        return Case(["--config=FILE"], config_file(["pass"], rng.choice(RETURNS)), [])
    statements, names = [], []
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = (
            rng.choice(KEYS)
            if rng.random() < 0.9
            else rng.choice(KEYS).rpartition(".")[0] or "seed"
        )
        names.append(key)
        value = (
            rng.choice(VALUES)
            if rng.random() < 0.7
            else repr(plausible(key, rng))
            if key in KEYS
            else "5"
        )
        value = value[1:-1] if value.startswith(("'(", '"(')) else value
        free = rng.choice(["", "with c.unlocked(), c.ignore_type():\n    "])
        how = rng.random()
        if how < 0.1:
            statements.append(f"with c.unlocked():\n    del c.{key}")
        elif how < 0.2:
            names[-1] = f"{key}_{rng.choice('aé')}"
            statements.append(f"with c.unlocked():\n    c.{names[-1]} = {value}")
        else:
            statements.append(f"{free}c.{key} = {value}")
    extra = [f"--config.seed={rng.choice(TEXTS)}"] if rng.random() < 0.1 else []
    return Case(
        ["--config=FILE", *extra], config_file(statements, "c"), names + ["seed"] * len(extra)
    )


def case(seed: int, number: int) -> Case:
    """Case `number` of those that a seed gives."""
    rng = random.Random(f"{seed}-{number}")
    return _overrides(rng) if rng.random() < 0.6 else _config_file(rng)
