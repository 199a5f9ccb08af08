import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from megabyte_jax import load
from tests import runs

FIELDS = {
    "bits_per_byte",
    "bits_per_byte_stderr",
    "bytes",
    "documents",
    "modality",
    "bad_records",
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
    "bits_per_byte_by_context",
    "context_bin",
    "cost_factor",
}
STRATEGIES = {  # and the stride of each
    "basic": runs.T,
    "sliding": runs.T // 2,
    "strided": runs.T,
    "sliding_strided": runs.T // 2,
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
        assert len(report["bits_per_byte_by_context"]) == 24 and report["context_bin"] == 1
        said = {name: report[name] for name in ("dataset", "split", "context", "strategy")}
        expected = {"dataset": str(text_dir), "split": split, "context": 24, "strategy": "basic"}
        assert said == expected and report["stride"] == 24 and report["step"] == 6


def test_the_splits_together_are_all_the_bytes_and_documents(by_split, text_dir):
    sizes = [path.stat().st_size for path in text_dir.iterdir()]
    assert sum(report["bytes"] for report in by_split.values()) == sum(sizes)
    assert sum(report["documents"] for report in by_split.values()) == len(sizes)


@pytest.fixture(scope="module")
def own_run(finished_run, tmp_path_factory):
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("own") / "run")


@pytest.mark.parametrize("strategy, stride", STRATEGIES.items())
def test_a_strategy_has_its_own_report_and_plot(own_run, strategy, stride, by_split):
    before = runs.contents(own_run)
    assert runs.run_main("eval", f"--workdir={own_run}", f"--strategy={strategy}") == 0
    made = runs.contents(own_run)
    names = {f"eval/test-{strategy}.json", f"eval/test-{strategy}.png"}
    assert made.keys() - before.keys() - {"eval"} == names
    report = json.loads(made[f"eval/test-{strategy}.json"])
    assert report.keys() == FIELDS
    assert (report["strategy"], report["stride"]) == (strategy, stride)
    assert report["bytes"] == by_split["test"]["bytes"]
    assert (report["cost_factor"] == 1) == (strategy == "basic") and report["cost_factor"] < 4
    if strategy == "basic":
        assert report["bits_per_byte"] == by_split["test"]["bits_per_byte"]
    with Image.open(own_run / f"eval/test-{strategy}.png", formats=["PNG"]) as image:
        image.verify()


@pytest.mark.parametrize("stride", [runs.P, runs.T])
def test_the_stride_is_that_of_the_flag(finished_run, tmp_path, stride):
    arguments = "--strategy=sliding", f"--stride={stride}"
    report = evaluate(finished_run, tmp_path / "out.json", *arguments)
    assert report["stride"] == stride
    assert (report["cost_factor"] == 1) == (stride == runs.T)
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "out.png"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_data_is_scored_whole_as_log_likelihood_does(
    finished_run, text_dir, tmp_path, strategy
):
    (tmp_path / "data").mkdir()
    documents = [b"", b"a", b"\xff" * 23, (text_dir / "13.txt").read_bytes()]
    for i, document in enumerate(documents):
        (tmp_path / "data" / str(i)).write_bytes(document)
    # The empty one counts as a bad record.
    arguments = f"--data={tmp_path}/data", f"--strategy={strategy}", "--max_bad_records=1"
    report = evaluate(finished_run, tmp_path / "out.json", *arguments)
    model = load(finished_run)
    nats = -sum(model.log_likelihood(d, strategy).astype(np.float64).sum() for d in documents)
    size = sum(map(len, documents))
    assert report["bytes"] == size and report["documents"] == 3 and report["split"] == "all"
    assert report["bad_records"] == 1
    np.testing.assert_allclose(report["bits_per_byte"], nats / math.log(2) / size, rtol=1e-6)
    assert report["word_perplexity"] is None  # 0xff is no text


def test_other_data_of_any_name_leave_the_scores_of_the_splits_alone(
    finished_run, tmp_path, monkeypatch
):
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "test").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    assert runs.run_main("eval", "--workdir=run", "--data=test") == 0
    assert {path.name for path in (tmp_path / "run" / "eval").iterdir()} >= {
        "data-test-basic.json",
        "data-test-basic.png",
    }
    assert not (tmp_path / "run" / "eval" / "test-basic.json").exists()


def test_a_file_shorter_than_a_sequence_is_evaluated(finished_run, tmp_path, capfd):
    (tmp_path / "short").write_bytes(b"abc")
    report = evaluate(finished_run, tmp_path / "out.json", f"--data={tmp_path}/short")
    assert report["bytes"] == 3 and report["documents"] == 1
    assert report["bits_per_byte_stderr"] is None and report["bits_per_byte_by_position"][3] is None
    out = capfd.readouterr().out
    assert f"bits_per_byte               {report['bits_per_byte']:.4f}\n" in out
    assert "cost_factor                 1.0000\n" in out
    assert out.endswith(f"plotted in {tmp_path}/out.png\nwritten to {tmp_path}/out.json\n")


def test_the_table_leaves_out_long_lists():
    shown = runs.entry_point("eval")["shown"]
    assert shown([1.0, None, 2.5]) == "1.0000 - 2.5000"
    assert shown([1.0] * 1024) == "1,024 figures, see the plot"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--workdir=/no/such"], ["--workdir=/no/such", "a run of train.py"]),
        (["--split=all"], ["--split=all", "train", "valid", "test"]),
        (["--data=/no/such"], ["--data='/no/such'", "accepted"]),
        (["--max_bad_records=-1"], ["max_bad_records", "-1"]),
        (["--output=HERE"], ["--output=", "a file that can be written"]),
        (["--output="], ["--output=:", "a file that can be written"]),
        (["--output=/"], ["--output=/:", "a file that can be written"]),
        (["--output=HERE/empty/x.json"], ["--output=", "a file that can be written"]),
        (["--output=HERE/x.PNG"], ["--output=", "x.PNG", "a file that can be written and no .png"]),
        (["--output=HERE/taken.json"], ["--output=", "taken.png", "a file that can be written"]),
        (["--output=/dev/null"], ["--output=/dev/null", "a file that can be written"]),
        (["--strategy=slide"], ["--strategy=slide", "basic", "strided", "sliding_strided"]),
        (["--stride=12"], ["--stride=12", "none", "--strategy=basic", "sliding"]),
        (["--strategy=strided", "--stride=24"], ["--stride=24", "none", "--strategy=strided"]),
        (["--strategy=sliding", "--stride=x"], ["stride", "x", "accepted"]),
        *(
            ([f"--strategy={strategy}", f"--stride={stride}"], [f"--stride={stride}", "from 4 to"])
            for strategy in ("sliding", "sliding_strided")
            for stride in (-4, 0, 2, 7, 28)
        ),
    ],
    ids=lambda x: " ".join(x),
)
def test_a_mistake_is_one_line_and_writes_nothing(finished_run, tmp_path, capfd, arguments, named):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "taken.png").mkdir()
    before = runs.contents(tmp_path), runs.contents(finished_run)
    given = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    assert runs.run_main("eval", f"--workdir={finished_run}", *given) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("eval.py: error: ") and err.count("\n") == 1
    assert all(part in err for part in named), err
    assert (runs.contents(tmp_path), runs.contents(finished_run)) == before


def test_data_that_cannot_be_used_are_named_with_a_status_of_their_own(
    finished_run, tmp_path, capfd
):
    (tmp_path / "a").write_bytes(b"fine")
    (tmp_path / "empty").write_bytes(b"")
    before = runs.contents(finished_run)
    assert runs.run_main("eval", f"--workdir={finished_run}", f"--data={tmp_path}") == 3
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(
        f"eval.py: error: {tmp_path}/empty: holds no byte; a larger"
    )
    assert err.count("\n") == 1 and runs.contents(finished_run) == before


@pytest.mark.parametrize("strategy", ["strided", "sliding_strided"])
def test_an_odd_patch_is_not_halved(finished_run, tmp_path, capfd, strategy):
    config = json.loads((finished_run / "config.json").read_text())
    config["model"]["patch_size"], config["model"]["global_model"]["dim"] = 3, 18
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").mkdir()
    before = runs.contents(tmp_path)
    assert runs.run_main("eval", f"--workdir={tmp_path}", f"--strategy={strategy}") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"--strategy={strategy}: accepted is basic or sliding" in err and "patch_size=3" in err
    assert runs.contents(tmp_path) == before


def test_a_failed_write_is_one_line_and_leaves_no_file(finished_run, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    arguments = f"--workdir={finished_run}", f"--output={tmp_path}/out.json"
    assert runs.run_main("eval", *arguments) == 2
    out, err = capfd.readouterr()
    assert "bits_per_byte " in out  # after all that work the figures are not lost
    assert err.count("\n") == 1 and "out.png: No space left on device; accepted is" in err
    assert runs.contents(tmp_path) == {}
