"""No source of ours can load code out of a file: S4."""

import ast
import json
from collections.abc import Iterator

import pytest

from tests import runs

MODULES = "pickle _pickle cPickle cloudpickle dill shelve marshal joblib torch yaml ruamel"
MODULES += " jsonpickle code codeop imp ctypes pty"
BUILTINS = "eval exec compile __import__ breakpoint"
CALLS = "os.system os.popen importlib.import_module runpy.run_path runpy.run_module pydoc.locate"
CALLS += " torch.load serialization.msgpack_restore tempfile.mktemp to_yaml from_yaml"
CALLS += " builder_from_directory builder_from_directories serialize_executable"
ARGUMENTS = {"allow_pickle": True, "shell": True, "weights_only": False, "verify": False}
# Of names that stand in the source itself.
ACCEPTED = {
    (file, "importlib.import_module")
    for file in (
        "megabyte_jax/__init__.py",
        "megabyte_jax/data/tfds_catalogue.py",
        "benchmarks/generation.py",
    )
}
# Of the C library that the process has anyway.
ACCEPTED.add(("megabyte_jax/peers.py", "ctypes"))


def sources() -> dict[str, str]:
    """What a user runs: the text of every program and of the notebooks' cells."""
    folders = ("megabyte_jax", "configs", "benchmarks")
    paths = [*runs.ROOT.glob("*.py"), *(p for f in folders for p in (runs.ROOT / f).rglob("*.py"))]
    found = {str(path.relative_to(runs.ROOT)): path.read_text() for path in paths}
    for path in (runs.ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found[str(path.relative_to(runs.ROOT))] = "\n".join(code)
    return found


def banned(text: str) -> Iterator[str]:
    """Names what of a program can load code, or turns off what prevents it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if {name, name.partition(".")[0]} & {*MODULES.split()} or name in CALLS.split():
                yield name
        if isinstance(node, ast.Name) and node.id in BUILTINS.split():
            yield node.id
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            yield from (c for c in CALLS.split() if whole == c or whole.endswith(f".{c}"))
        if isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            if not isinstance(node.value, ast.Constant) or node.value.value == ARGUMENTS[node.arg]:
                yield node.arg
        if isinstance(node, ast.Constant) and "compilation_cache" in str(node.value):
            yield "compilation_cache"


@pytest.mark.parametrize("file", sources())
def test_no_source_loads_code_out_of_a_file(file):
    assert [name for name in banned(sources()[file]) if (file, name) not in ACCEPTED] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy, dill as d",
        "def f():\n    import torch.serialization",
        "import yaml",
        "eval('1')",
        "run = exec",
        "np.load('x', allow_pickle=flag)",
        "f(allow_pickle=True)",
        "os.system('ls')",
        "from os import system",
        "from os import popen",
        "subprocess.run('x', shell=True)",
        "importlib.import_module(name)",
        "config.to_yaml()",
        "tfds.builder_from_directory(path)",
        "jax.config.update('jax_compilation_cache_dir', 'x')",
        "from flax.serialization import msgpack_restore\nserialization.msgpack_restore(x)",
    ],
)
def test_the_lint_finds_it(text):
    assert list(banned(text))


@pytest.mark.parametrize(
    "text", ["re.compile('x')", "step.lower().compile()", "np.load(x)", "config.eval", "f(shell=0)"]
)
def test_the_lint_finds_nothing_else(text):
    assert not list(banned(text))


def test_nothing_of_ours_is_kept_as_code():
    """What JAX compiled is native code: only the tests keep it, and in their own folder."""
    assert all("compilation_cache" not in text for text in sources().values())
    assert not list(runs.ROOT.rglob("megabyte_jax/**/*.pkl"))
