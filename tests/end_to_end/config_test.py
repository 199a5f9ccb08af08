import importlib
import math
import os
import re
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import million
from megabyte_jax import run_config, run_summary
from megabyte_jax.errors import UserError
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
def test_every_shipped_config_is_valid_and_its_model_builds(name, size, tmp_path):
    config = importlib.import_module(name).get_config(*([size] if size else []))
    model = run_config.validate(config)
    params = run_summary.parameters(model)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count(model)
    x = jax.ShapeDtypeStruct((1, model.seq_len), "uint8")
    assert jax.eval_shape(lambda *args: functional.nll(model, *args), params, x).shape == x.shape
    start = time.monotonic()
    assert f"parameters        {count(model):,}\n" in run_summary.text(
        config, str(tmp_path / "run")
    )
    assert time.monotonic() - start < 5 and not list(tmp_path.iterdir())


# Arguments of train.py -> what its one line must hold: the option, the value, what is accepted.
BAD = [
    (["--config.optimizer.rate=1"], ["--config.optimizer.rate: unknown", "configs/base.py"]),
    (["--config.speed=1"], ["--config.speed: unknown", "configs/base.py"]),
    (["--config.seed.x=1"], ["--config.seed.x: unknown", "configs/base.py"]),
    (["--config.optimizer.learning_rate=fast"], ["optimizer.learning_rate", "fast"]),
    (["--config.train.batch_size=1.5"], ["train.batch_size", "1.5"]),
    (["--config.model.global_model.rope=7"], ["model.global_model.rope", "7"]),
    (["--config.optimizer.learning_rate=-1"], ["optimizer.learning_rate=-1.0", "1e-12 to 10"]),
    (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate=nan", "1e-12 to 10"]),
    (["--config.optimizer.learning_rate=inf"], ["optimizer.learning_rate=inf", "1e-12 to 10"]),
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
    (["--config=RAISES"], ["/raises: ", "ZeroDivisionError", "accepted is a Python file"]),
    (["--config=EXITS"], ["/exits: ", "exits with 0", "accepted is a Python file"]),
    (["--config=RETURNS"], ["/returns: ", "dict", "accepted is a Python file"]),
    (["--config.seed=" + "9" * 5000], ["config.seed=999", "accepted is"]),
    (["--config.train.skip=((0,'x'),)"], ["train.skip=((0, 'x'),)", "(first, stop)"]),
    (["--config.optimizer.eps=1e-300"], ["optimizer.eps=1e-300", "1e-16 to 1"]),
    (["--config.optimizer.learning_rate=1e30"], ["learning_rate=1e+30", "1e-12 to 10"]),
    (["--config.sample.temperature=nan"], ["sample.temperature=nan", "0.001 to 1000, or 0"]),
    (["--config.model.global_model.dropout=0.9999999999"], ["global_model.dropout", "0 to 0.99"]),
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
    """A directory with an empty file, a short one, and config files that are none."""
    monkeypatch.chdir(runs.ROOT)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"x" * 111)
    (tmp_path / "no_python").write_text("this is not")
    (tmp_path / "raises").write_text("def get_config():\n    1 / 0\n")
    (tmp_path / "exits").write_text("raise SystemExit(0)\n")
    (tmp_path / "returns").write_text("def get_config():\n    return {}\n")
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
    for name in ("empty", "short", "no_python", "raises", "exits", "returns"):
        arguments = [a.replace(name.upper(), f"{place}/{name}") for a in arguments]
    assert runs.run_main("train", *defaults, *arguments) == status
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: error: ")
    assert all(part in err for part in named) and "Traceback" not in err, err
    assert runs.contents(place) == before


def test_a_work_directory_of_another_run_is_left_alone(finished_run, capfd):
    before = runs.contents(finished_run)
    arguments = ["--config=configs/quickstart.py", f"--workdir={finished_run}"]
    for option in ("--accept_config_change", "--validate_only"):
        assert runs.run_main("train", *arguments, option) == 2
        *lines, last = capfd.readouterr().err.splitlines()
        assert last.startswith("train.py: error: --workdir=") and "holds another run" in last
        assert all(re.fullmatch(r"[\w.]+: .* -> .* \((free|needs|refused).*\)", x) for x in lines)
        assert any(line.startswith("optimizer.name: 'adamw' -> 'muon' (refused)") for line in lines)
    assert runs.contents(finished_run) == before


BARE = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as exit:
    print("status", exit.code or 0)
from jax._src import xla_bridge
print("backends", xla_bridge.backends_are_initialized())
"""


@pytest.mark.parametrize("config", ["base.py", "million.py:image640"])
def test_validate_only_says_what_a_run_would_be_and_touches_nothing(config, tmp_path):
    arguments = [f"--config={runs.ROOT}/configs/{config}", f"--workdir={tmp_path}/run"]
    option = ["--config.data.source=/no/such", "--validate_only"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments, *option],
        cwd=runs.ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.stderr == "" and done.stdout.splitlines()[-2:] == ["status 0", "backends False"]
    assert not list(tmp_path.iterdir())


def test_validate_only_gives_the_sizes_of_what_a_run_saved(finished_run, text_dir, capfd):
    config = run_config.load(finished_run)
    said = dict(
        line.split(None, 1) for line in run_summary.text(config, str(finished_run)).splitlines()
    )
    state = runs.saved_state(finished_run, 6)
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    assert said["state"].startswith(f"{size:,} bytes: ")
    assert said["update"] == "96 bytes: 4 sequences of 24" and said["updates"].startswith("6, 576 ")
    assert capfd.readouterr().err == ""


def test_validate_only_says_what_differs_from_the_run_that_is_there(finished_run, capfd):
    before, config = runs.contents(finished_run), run_config.load(finished_run)
    config.train.num_steps = 9
    with pytest.raises(UserError, match="of train.num_steps; accepted .*--accept_config_change"):
        run_summary.text(config, str(finished_run))
    assert "updates           9, 864 " in run_summary.text(config, str(finished_run), True)
    line = "train.num_steps: 6 -> 9 (needs --accept_config_change)\n"
    assert capfd.readouterr().err == 2 * line
    assert runs.contents(finished_run) == before


@pytest.mark.parametrize("mesh", ["mesh.fsdp=5", "mesh.sequence=7", "mesh.fsdp=-1"])
def test_validate_only_checks_what_no_mesh_could_divide(mesh, place, capfd):
    arguments = ["--config=configs/quickstart.py", f"--workdir={place}/run", "--validate_only"]
    assert runs.run_main("train", *arguments, f"--config.{mesh}") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "mesh" in err and "accepted" in err


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
