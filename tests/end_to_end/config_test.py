import importlib
import math
import os

import jax
import pytest

from configs import million
from megabyte_jax import run_config
from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig
from megabyte_jax.models.presets import PAPER_BASELINES, PAPER_MODELS
from tests import runs

FILES = sorted(
    path.relative_to(runs.ROOT).with_suffix("") for path in (runs.ROOT / "configs").rglob("*.py")
)
SHIPPED = [".".join(path.parts) for path in FILES]
ALL = [(name, None) for name in SHIPPED]
ALL += [
    (f"configs.paper.{name}", size)
    for name in ("text", "imagenet", "audio")
    for size in importlib.import_module(f"configs.paper.{name}").SIZES
]
ALL += [("configs.million", size) for size in million.SIZES]
ALL += [("configs.transformer", size) for size in ("small_window", *PAPER_BASELINES)]


def test_every_model_of_the_paper_is_a_size_of_one_config():
    sizes = [size for name, size in ALL if name.startswith("configs.paper.") and size]
    assert sorted(set(sizes) & set(PAPER_MODELS)) == sorted(PAPER_MODELS)


def count(config):
    """Parameters, added up from the equations of section 2."""

    def stack(s):
        attended, shared = s.num_heads * s.head_width, s.kv_heads * s.head_width
        weights = 2 * s.dim * (attended + shared)
        weights += s.dim * s.hidden_dim * (3 if s.activation == "swiglu" else 2)
        biases = attended + 2 * shared + s.dim + s.hidden_dim + s.dim
        biases += s.hidden_dim * (s.activation == "swiglu")
        norm = s.dim * (1 + (s.bias and s.norm == "layernorm"))
        heads = 2 * s.head_width * s.qk_norm
        return s.num_layers * (weights + biases * s.bias + 2 * norm + heads) + norm

    if isinstance(config, ByteTransformerConfig):
        rows = 256 + 1 + config.seq_len * config.byte_positions
        return stack(config.transformer) + rows * config.transformer.dim
    byte_dim, local_dim = config.byte_dim, config.local_model.dim
    embedder = 256 * byte_dim + config.seq_len * byte_dim * config.byte_positions
    embedder += config.global_model.dim  # the pad of the global model
    embedder += sum(kernel * byte_dim**2 + byte_dim for kernel in config.conv_kernels)
    local = 256 * local_dim + local_dim + config.patch_size * local_dim * config.local_positions
    stages = stack(config.global_model) + stack(config.local_model)
    return embedder + byte_dim * local_dim + local + stages


@pytest.mark.parametrize("name, size", ALL)
def test_every_shipped_config_is_valid_and_its_model_builds(name, size):
    config = importlib.import_module(name).get_config(*([size] if size else []))
    model = run_config.validate(config)
    params = jax.eval_shape(lambda: functional.init_params(model, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count(model)
    x = jax.ShapeDtypeStruct((1, model.seq_len), "uint8")
    assert jax.eval_shape(lambda *args: functional.nll(model, *args), params, x).shape == x.shape


# Arguments of train.py -> what its one line must hold: the option, the value, what is accepted.
BAD = [
    (["--config.optimizer.rate=1"], ["--config.optimizer.rate: unknown", "configs/base.py"]),
    (["--config.speed=1"], ["--config.speed: unknown", "configs/base.py"]),
    (["--config.seed.x=1"], ["--config.seed.x: unknown", "configs/base.py"]),
    (["--config.optimizer.learning_rate=fast"], ["optimizer.learning_rate", "fast"]),
    (["--config.train.batch_size=1.5"], ["train.batch_size", "1.5"]),
    (["--config.model.global_model.rope=7"], ["model.global_model.rope", "7"]),
    (["--config.optimizer.learning_rate=-1"], ["optimizer.learning_rate=-1.0", "above 0"]),
    (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate=nan", "above 0"]),
    (["--config.optimizer.learning_rate=inf"], ["optimizer.learning_rate=inf", "above 0"]),
    (["--config.train.batch_size=0"], ["train.batch_size=0", "at least 1"]),
    (["--config.model.global_model.dim=250"], ["model.global_model.dim=250", "num_heads=4"]),
    (
        ["--config.model.global_model.dim=260", "--config.model.global_model.num_heads=2"],
        ["model.global_model.dim=260", "256, 264"],
    ),
    (["--config.model.seq_len=511"], ["model.seq_len=511", "multiple of patch_size=8"]),
    (["--config.data.source=/no/such"], ["data.source='/no/such'", "accepted"]),
    (["--config.data.split.by=folder"], ["data.split.by='folder'", "document, bytes, name"]),
    (["--config.data.source=tfds:a:b"], ["data.split.by='document'", "accepted is name"]),
    (
        ["--config.data.source=tfds:a:b", "--config.data.split.by=name"],
        ["data.source='tfds:a:b'", "tfds:NAME/CONFIG"],
    ),
    (
        ["--config.data.source=SHORT", "--config.data.split.by=bytes"],
        ["99 bytes", "model.seq_len=512"],
    ),
    (
        ["--config=configs/nothing.py"],
        ["--config=configs/nothing.py: ", "No such file", "accepted"],
    ),
    (
        ["--config=configs/nothing.py", "--config.seed=1"],
        ["--config=configs/nothing.py: ", "No such"],
    ),
    (["--config=configs/quickstart.py:9t"], ["--config=configs/quickstart.py:9t", "get_config()"]),
    (["--config=NO_PYTHON"], ["/no_python: ", "accepted is a Python file"]),
    (
        ["--config=configs/paper/text.py:9t"],
        ["--config=configs/paper/text.py:9t", "size='9t'", "758m_262m"],
    ),
    (
        ["--config=configs/transformer.py:9t"],
        ["--config=configs/transformer.py:9t", "size='9t'", "small_window", "320m"],
    ),
    (["--workdir=SHORT"], ["--workdir=", "accepted is a directory"]),
    (["--workdir=/proc/run"], ["--workdir=/proc/run", "accepted is a directory"]),
    (["--config.optimizer.warmup_steps=9999999"], ["optimizer.warmup_steps=9999999", "budget"]),
    (["--config.train.num_steps=5"], ["train.num_steps=5", "num_bytes"]),
    (["more"], ["'more'", "--help"]),
    (["--no_such_flag=1"], ["no_such_flag"]),
]


# The same for data, whose status is 3.
UNUSABLE = [
    (["--config.data.source=EMPTY"], ["/empty: holds no byte", "data.max_bad_records=0"]),
    (["--config.data.source=/proc/self/mem"], ["/proc/self/mem: ", "data.max_bad_records=0"]),
    (
        ["--config.data.source=tfds:byte_files/x", "--config.data.split.by=name"],
        ["data.source='tfds:byte_files/x'", "not found", "data prepare"],
    ),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with an empty file and a short one."""
    monkeypatch.chdir(runs.ROOT)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"x" * 111)
    (tmp_path / "no_python").write_text("this is not")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, named, status",
    [(*case, 2) for case in BAD] + [(*case, 3) for case in UNUSABLE],
    ids=lambda x: x if isinstance(x, int) else x[0],
)
def test_a_mistake_is_one_line_and_leaves_everything_as_it_was(
    arguments, named, status, place, capfd
):
    before = runs.contents(place)
    defaults = ["--config=configs/quickstart.py", f"--workdir={place}/run"]
    for name in ("empty", "short", "no_python"):
        arguments = [a.replace(name.upper(), f"{place}/{name}") for a in arguments]
    assert runs.run_main("train", *defaults, *arguments) == status
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: error: ")
    assert all(part in err for part in named) and "Traceback" not in err, err
    assert runs.contents(place) == before


def test_a_work_directory_of_another_run_is_left_alone(finished_run, capfd):
    before = runs.contents(finished_run)
    arguments = ["--config=configs/quickstart.py", f"--workdir={finished_run}"]
    assert runs.run_main("train", *arguments) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "holds another run" in err and "accepted is" in err
    assert runs.contents(finished_run) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("what", ["source", "workdir"])
def test_what_may_not_be_read_or_written_is_named(what, place, capfd):
    (place / "short").chmod(0)
    place.chmod(0o500)
    option = f"--config.data.source={place}/short" if what == "source" else "--log_dir=/tmp"
    arguments = ["--config=configs/quickstart.py", f"--workdir={place}/run", option]
    assert runs.run_main("train", *arguments) == 2
    err = capfd.readouterr().err
    place.chmod(0o700)
    assert err.count("\n") == 1 and "Permission denied" in err and what in err
