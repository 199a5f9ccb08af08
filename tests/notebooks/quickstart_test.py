"""The notebook runs from top to bottom, with a smaller budget in the cell of its parameters."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"

SMALLER = """
config.train.num_bytes = 4 * 512 * 12
config.optimizer.update(warmup_steps=2, warmup_bytes=0)
config.log_interval = 2
config.eval.num_bytes = 4096
config.sample.num_bytes = 8
workdir = __import__("pathlib").Path({workdir!r})
"""


# The kernel's own libraries warn of their event loop when they close.
@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_notebook_trains_plots_evaluates_and_writes(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) == 10
    place = next(
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())
    )
    smaller = nbformat.v4.new_code_cell(SMALLER.format(workdir=str(tmp_path / "run")))
    notebook.cells.insert(place + 1, smaller)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}
    ).execute()
    outputs = [str(cell.get("outputs")) for cell in notebook.cells]
    assert sum("image/png" in output for output in outputs) == 2
    assert any("bits per byte on" in output for output in outputs)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
