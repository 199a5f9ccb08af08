import json
import math

import numpy as np
import pytest

from megabyte_jax import load
from tests import runs

FIELDS = {
    "bits_per_byte",
    "bits_per_byte_stderr",
    "bytes",
    "documents",
    "dataset",
    "split",
    "context",
    "strategy",
    "stride",
    "step",
    "words",
    "word_perplexity",
    "bytes_per_second",
    "bits_per_byte_by_position",
}


def evaluate(workdir, output, *arguments):
    """Runs eval.py and returns what it wrote to a file."""
    arguments = f"--workdir={workdir}", f"--output={output}", *arguments
    assert runs.run_main("eval", *arguments) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def by_split(finished_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("eval") / "deep" / "report.json"
    return {s: evaluate(finished_run, output, f"--split={s}") for s in ("train", "valid", "test")}


def test_the_report_holds_the_figure_and_its_protocol(by_split, text_dir):
    for split, report in by_split.items():
        assert report.keys() == FIELDS
        assert 4 < report["bits_per_byte"] < 8 and 0 < report["bits_per_byte_stderr"] < 2
        assert len(report["bits_per_byte_by_position"]) == runs.P
        said = {name: report[name] for name in ("dataset", "split", "context", "strategy")}
        expected = {"dataset": str(text_dir), "split": split, "context": 24, "strategy": "basic"}
        assert said == expected and report["stride"] == 24 and report["step"] == 6


def test_the_splits_together_are_all_the_bytes_and_documents(by_split, text_dir):
    sizes = [path.stat().st_size for path in text_dir.iterdir()]
    assert sum(report["bytes"] for report in by_split.values()) == sum(sizes)
    assert sum(report["documents"] for report in by_split.values()) == len(sizes)


def test_other_data_is_scored_whole_as_log_likelihood_does(finished_run, text_dir, tmp_path):
    (tmp_path / "data").mkdir()
    documents = [b"", b"a", b"\xff" * 23, (text_dir / "13.txt").read_bytes()]
    for i, document in enumerate(documents):
        (tmp_path / "data" / str(i)).write_bytes(document)
    report = evaluate(finished_run, tmp_path / "out.json", f"--data={tmp_path}/data")
    model = load(finished_run)
    nats = -sum(model.log_likelihood(d).astype(np.float64).sum() for d in documents)
    size = sum(map(len, documents))
    assert report["bytes"] == size and report["documents"] == 4 and report["split"] == "all"
    np.testing.assert_allclose(report["bits_per_byte"], nats / math.log(2) / size, rtol=1e-6)
    assert report["word_perplexity"] is None  # 0xff is no text


def test_a_file_shorter_than_a_sequence_is_evaluated(finished_run, tmp_path, capfd):
    (tmp_path / "short").write_bytes(b"abc")
    report = evaluate(finished_run, tmp_path / "out.json", f"--data={tmp_path}/short")
    assert report["bytes"] == 3 and report["documents"] == 1
    assert report["bits_per_byte_stderr"] is None and report["bits_per_byte_by_position"][3] is None
    out = capfd.readouterr().out
    assert f"bits_per_byte               {report['bits_per_byte']:.4f}\n" in out
    assert out.endswith(f"written to {tmp_path}/out.json\n")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--workdir=/no/such"], ["--workdir=/no/such", "a run of train.py"]),
        (["--split=all"], ["--split=all", "train", "valid", "test"]),
        (["--data=/no/such"], ["--data='/no/such'", "accepted"]),
        (["--data=HERE/empty"], ["--data=", "empty", "accepted"]),
        (["--output=HERE"], ["--output=", "a file that can be written"]),
        (["--output=HERE/empty/x.json"], ["--output=", "a file that can be written"]),
    ],
    ids=lambda x: x[0],
)
def test_a_mistake_is_one_line_and_writes_nothing(finished_run, tmp_path, capfd, arguments, named):
    (tmp_path / "empty").write_bytes(b"")
    before = runs.contents(tmp_path), runs.contents(finished_run)
    given = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    assert runs.run_main("eval", f"--workdir={finished_run}", *given) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("eval.py: error: ") and err.count("\n") == 1
    assert all(part in err for part in named), err
    assert (runs.contents(tmp_path), runs.contents(finished_run)) == before
