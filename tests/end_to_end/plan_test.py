import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from megabyte_jax.errors import PlanError
from megabyte_jax.planning import step as steps
from megabyte_jax.planning.topology import parse
from tests import runs

CONFIG = """\
import sys
sys.path.insert(0, {root!r})
from tests import runs

def get_config():
    return runs.tiny_config("somewhere", **{changes!r})
"""
EIGHT = {"train.batch_size": 8, "train.grad_accumulation": 1}
TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is an optional extra"
)


def write_config(folder, **changes):
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(root=str(runs.ROOT), changes=changes))
    return path


def plan_here(*arguments):
    """Another process, in which nothing is imported and eight devices are attached."""
    command = [sys.executable, str(runs.ROOT / "plan.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def test_a_plan_for_this_machine_is_printed_and_written(tmp_path, capsys):
    path, output = write_config(tmp_path), tmp_path / "plan.json"
    assert runs.run_main("plan", f"--config={path}", "--topology=local", f"--output={output}") == 0
    printed = capsys.readouterr()
    assert "IT FITS" in printed.out and "Budget of 6 updates, 576 bytes" in printed.out
    assert "compiling the train step for local" in printed.err
    fields = json.loads(output.read_text())
    assert fields["devices"] == 1 and not fields["collectives"]
    assert fields["memory_bytes"]["total"] < fields["memory_bytes"]["available"]
    assert {entry.name for entry in tmp_path.iterdir()} - {"__pycache__"} == {
        "plan.json",
        "tiny.py",
    }


def test_a_search_ranks_meshes_of_all_devices(capsys):
    function = runs.entry_point("plan")["plan"]
    config = runs.tiny_config("somewhere", **EIGHT)
    text, fields = function(config, parse("local"), "", True, 2)
    ranked = fields["ranked"]
    assert 1 <= len(ranked) <= 2 and all("--config.mesh.fsdp=" in plan["flags"] for plan in ranked)
    assert "chip-hours" in text or "device-hours" in text
    assert "ways to divide model and batch" in capsys.readouterr().err


def test_what_does_not_fit_ends_with_status_4_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "available", lambda topology: 2**12)
    path, output = write_config(tmp_path), tmp_path / "plan.json"
    arguments = f"--config={path}", "--topology=local", f"--output={output}", "--max_compiles=1"
    assert runs.run_main("plan", *arguments) == PlanError.exit_status == 4
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("plan.py: error: --topology=local: does not fit") and "GiB" in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:3x5"], "--topology=v5e:3x5: no slice of v5e"),
        (["--topology=h100"], "--topology=h100: unknown"),
        (["--topology=local", "--mesh=fsdp=3"], "sizes whose product is 1"),
        (["--topology=local", "--mesh=rows=3"], "--mesh=rows=3"),
        (["--topology=local", "--max_compiles=0"], "--max_compiles"),
        (["--topology=local", "--output=/dev/null"], "--output=/dev/null"),
        (["--topology=local", "--config.model.patch_size=5"], "model."),
        ([], "--topology"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    path = write_config(tmp_path)
    assert runs.run_main("plan", f"--config={path}", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_without_libtpu_a_slice_is_a_mistake_told_before_anything_is_imported(tmp_path):
    if importlib.util.find_spec("libtpu"):
        pytest.skip("the TPU compiler is here")
    found = plan_here(f"--config={write_config(tmp_path)}", "--topology=v5e:2x4")
    assert found.returncode == 2 and "pip install 'megabyte-jax[tpu]'" in found.stderr
    assert len(found.stderr.splitlines()) == 1


@TPU
def test_a_plan_for_a_slice_needs_no_tpu_and_nothing_in_the_environment(tmp_path):
    path = write_config(tmp_path, **EIGHT)
    found = plan_here(f"--config={path}", "--topology=v5e-8", "--mesh=fsdp=4,sequence=2")
    assert found.returncode == 0, found.stderr
    assert "v5e:2x4 = v5e-8: 8 chips" in found.stdout and "15.750 GiB per chip" in found.stdout
    assert "compiler's own estimate" in found.stdout
    assert jax.devices()[0].platform == "cpu"


@TPU
def test_a_model_too_large_for_a_slice_ends_with_what_makes_it_fit(tmp_path):
    path = write_config(tmp_path, **EIGHT | {"model.global_model.mlp_dim": 2**27})
    found = plan_here(f"--config={path}", "--topology=v5e-1", "--mesh=data=1")
    assert found.returncode == 4
    assert "GiB too much, most of it parameters and optimizer's state" in found.stderr
