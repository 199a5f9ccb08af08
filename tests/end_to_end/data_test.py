import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from megabyte_jax.data import __main__ as command
from megabyte_jax.data import audio, windows
from megabyte_jax.data.corpus import open_corpus
from megabyte_jax.data.splits import split_corpus
from megabyte_jax.text import printable
from tests import runs

SMALL = ["--config.model.seq_len=48", "--config.model.patch_size=12", "--config.train.batch_size=4"]
SMALL += ["--config.model.global_model.dim=24", "--config.model.global_model.num_heads=2"]

BY_NAME = ["--config.data.split.by=name"]
SETS = "--config.data.tfds.data_dir=sets"


def data(monkeypatch, *arguments):
    """Runs the command line in this process; its exit status."""
    for name in set(flags.FLAGS) - runs.FLAGS_OF_LIBRARIES:
        delattr(flags.FLAGS, name)
    monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the load_module")  # ml_collections calls it
        runpy.run_path(command.__file__, run_name="__main__")
    return exit.value.code or 0


def cells(out, label):
    """The columns of a row of the table."""
    (line,) = [line for line in out.splitlines() if line.startswith(label + "  ")]
    return line.removeprefix(label).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files in sub-folders of the splits; the current directory is the one above."""
    monkeypatch.chdir(tmp_path)
    for split, count in {"train": 30, "val": 3, "test": 2}.items():
        (tmp_path / "docs" / split).mkdir(parents=True)
        for number in range(count):
            text = f"{split} {number} été\n" * (number + 1)
            (tmp_path / "docs" / split / f"{number:02}").write_text(text)
    return tmp_path / "docs"


def sizes(folder):
    return [path.stat().st_size for path in folder.iterdir()]


def test_the_splits_are_counted_and_the_batch_is_that_of_training(folder, monkeypatch, capfd):
    assert data(monkeypatch, "docs", *SMALL, *BY_NAME) == 0
    out, err = capfd.readouterr()
    assert err == "" and out.startswith("docs, modality bytes\n")
    splits = [sizes(folder / name) for name in ("train", "val", "test")]
    assert cells(out, "documents") == ["30", "3", "2"]
    assert cells(out, "bytes") == [f"{sum(split):,}" for split in splits]
    assert cells(out, "mean document, bytes") == [f"{np.mean(split):,.1f}" for split in splits]
    assert cells(out, "longest") == [f"{max(split):,}" for split in splits]
    assert 0 < float(cells(out, "gzip -9, bits per byte")[0]) < 8
    train = split_corpus(open_corpus("docs"), "train", by="name", valid_size=0, test_size=0)
    sampler = windows.TrainWindows(train, 48, 4, seed=0)
    n = sampler.num_windows
    assert f"an epoch is {n:,} windows of 48 bytes, {n / 4:.1f} updates of 4 windows\n" in out
    for number, row in enumerate(sampler.batch(0)):
        assert f"row {number}: {printable(row.tobytes())}\n" in out
    assert {path.name for path in folder.parent.iterdir()} == {"docs"}


def test_a_split_that_is_empty_is_a_finding(folder, monkeypatch, capfd):
    (folder / "test" / "00").unlink()
    (folder / "test" / "01").unlink()
    assert data(monkeypatch, "docs", *SMALL, *BY_NAME) == 0
    out, err = capfd.readouterr()
    assert err == "" and cells(out, "documents") == ["30", "3", "-"]
    assert "no test split: data.split.by='name': the test split of 'docs' is empty" in out


def test_compressors_get_no_more_than_num_bytes(folder, monkeypatch, capfd):
    assert data(monkeypatch, "docs", *SMALL, *BY_NAME, "--num_bytes=50") == 0
    out, _ = capfd.readouterr()
    assert cells(out, "bytes measured") == ["50", "50", str(min(50, sum(sizes(folder / "test"))))]


def test_a_separator_is_in_the_batch(folder, monkeypatch, capfd):
    separator = "--config.data.separator=<|é|>"
    arguments = [*SMALL, *BY_NAME, "--config.model.seq_len=480"]
    assert data(monkeypatch, "docs", *arguments, separator) == 0
    assert "\n<|é|>train " in capfd.readouterr().out


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """PNG files of 4 x 6 pixels, their pixels, and the arguments that read them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "png").mkdir()
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (4, 6, 3), np.uint8) for _ in range(20)]
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "png" / f"{number}.png")
    image = ["--config.data.modality=image", "--config.data.image.height=4"]
    image += ["--config.data.image.width=6", "--config.data.cache_dir=cache"]
    return pixels, ["png", *SMALL, "--config.model.seq_len=72", *image]


def test_a_batch_of_images_is_drawn_pixel_by_pixel(pictures, tmp_path, monkeypatch, capfd):
    pixels, arguments = pictures
    assert data(monkeypatch, *arguments, "--picture=new/x.png") == 0
    out, err = capfd.readouterr()
    assert err == "" and out.endswith("the first batch is drawn in new/x.png\n")
    with Image.open(tmp_path / "new" / "x.png", formats=["PNG"]) as file:
        drawn = np.asarray(file)
    shown = [drawn[y : y + 4, x : x + 6].tobytes() for y in (0, 6) for x in (0, 8)]
    assert len({*shown}) == 4 and {*shown} <= {image.tobytes() for image in pixels}
    assert float(cells(out, "PNG, bits per byte")[0]) > 8  # of noise, with its headers
    assert data(monkeypatch, *arguments) == 0
    assert (tmp_path / "batch.png").read_bytes() == (tmp_path / "new" / "x.png").read_bytes()


def test_a_damaged_cache_is_found(pictures, tmp_path, monkeypatch, capfd):
    _, arguments = pictures
    assert data(monkeypatch, *arguments) == 0
    for path in tmp_path.glob("cache/*/data.bin"):
        path.write_bytes(bytes(path.stat().st_size))
    capfd.readouterr()
    assert refused(monkeypatch, capfd, *arguments, status=3).endswith("it is made again\n")


def test_bad_records_are_counted_or_stop_it(pictures, tmp_path, monkeypatch, capfd):
    _, arguments = pictures
    (tmp_path / "png" / "text.png").write_text("no image")
    err = refused(monkeypatch, capfd, *arguments, status=3)
    assert "png/text.png: no image" in err
    assert data(monkeypatch, *arguments, "--config.data.max_bad_records=1") == 0
    out, err = capfd.readouterr()
    assert err.startswith("left out 1 bad records, the first: png/text.png: no image")
    assert sum(int(cell) for cell in cells(out, "documents") if cell != "-") == 20


def test_a_batch_of_sound_is_drawn(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wav").mkdir()
    for number in range(20):
        samples = (9000 * np.sin(np.arange(200) / (number + 1))).astype("<i2")
        (tmp_path / "wav" / f"{number}.wav").write_bytes(audio.encode(samples.tobytes(), 100))
    sound = ["--config.data.modality=audio", "--config.data.audio.sample_rate=100"]
    sound += ["--config.data.cache_dir=cache"]
    assert data(monkeypatch, "wav", *SMALL, *sound) == 0
    out, err = capfd.readouterr()
    assert err == "" and 0 < float(cells(out, "FLAC -8, bits per byte")[0])
    with Image.open(tmp_path / "batch.png", formats=["PNG"]) as file:
        file.load()


def refused(monkeypatch, capfd, *arguments, status=2):
    """The one line on stderr; nothing is on stdout."""
    assert data(monkeypatch, *arguments) == status
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("megabyte_jax.data: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "arguments 'none': accepted is DATASET, and flags"),
        (["docs", "more"], "arguments 'docs more': accepted is DATASET"),
        (["nowhere"], "data.source='nowhere': no such file or folder; accepted"),
        (["tfds:x"], "data.split.by='document': accepted is name for a TFDS source"),
        (["tfds:../x", *BY_NAME], "data.source='tfds:../x': accepted is"),
        (["docs"], "fewer than model.seq_len=8192"),
        (["docs", "--config.data.nope=1"], "--config.data.nope: unknown; accepted are the keys"),
        (["docs", "--config=nope.py"], "--config=nope.py: "),
        (["docs", "--config.data.modality=smell"], "data.modality='smell': accepted is one of"),
        (["docs", "--num_bytes=0"], "--num_bytes=0: 0 is not a positive integer"),
        (["docs", "--data_dir=x"], "flag 'data_dir'"),
        (["docs", "--picture=x.png"], "--picture=x.png: accepted where config.data.modality is"),
        (
            ["docs", *BY_NAME, "--config.data.split.train=nope"],
            "the train split of 'docs' is empty",
        ),
        (["prepare"], "arguments 'prepare': accepted is prepare NAME SOURCE, and flags"),
        (["prepare", "mine"], "arguments 'prepare mine': accepted is prepare NAME SOURCE"),
        (["prepare", "mine", "nowhere"], "SOURCE='nowhere': no such file or folder"),
        (["prepare", "../mine", "docs"], "../mine"),
        (["prepare", "mine", "docs", "--picture=x.png"], "picture"),
        (
            ["prepare", "mine", "docs", *BY_NAME, "--config.data.split.train=nope"],
            "the train split of 'docs' is empty",
        ),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_no_file(folder, monkeypatch, capfd, arguments, named):
    before = runs.contents(folder.parent)
    assert named in refused(monkeypatch, capfd, *arguments)
    assert runs.contents(folder.parent) == before


@pytest.mark.parametrize("picture", ["png", "png/1.png/x.png", "/dev/null"])
def test_a_picture_that_cannot_be_written_is_one_line(pictures, monkeypatch, capfd, picture):
    before = runs.contents(Path())
    err = refused(monkeypatch, capfd, *pictures[1], f"--picture={picture}")
    assert f"--picture={picture}: accepted is a file that can be written" in err
    assert runs.contents(Path()) == before


def test_a_folder_is_prepared_and_then_read(folder, monkeypatch, capfd):
    assert data(monkeypatch, "prepare", "mine", "docs", SETS, *BY_NAME) == 0
    out, _ = capfd.readouterr()
    total = sum(sizes(folder / "train"))
    assert f"train: 30 documents, {total:,} bytes of files\nvalidation: 3 documents, " in out
    assert "written to sets/byte_files/mine/1.0.0; it is trained on with\n" in out
    options = out.splitlines()[-1].split()
    arguments = [*SMALL, *BY_NAME, "--config.data.cache_dir=cache"]
    assert data(monkeypatch, "tfds:byte_files/mine", *options, *arguments) == 0
    out, err = capfd.readouterr()
    assert err == "" and cells(out, "documents") == ["30", "3", "2"]
    assert cells(out, "bytes")[0] == f"{total:,}"
    assert "tensorflow" not in sys.modules
    # Once more, and into the directory that the config names.
    err = refused(monkeypatch, capfd, "prepare", "mine", "docs", *BY_NAME, SETS)
    assert "sets/byte_files/mine/1.0.0: is there already" in err


def test_a_run_on_a_prepared_set_is_that_on_its_files(folder, tmp_path, monkeypatch):
    assert data(monkeypatch, "prepare", "mine", "docs", SETS, *BY_NAME) == 0
    options = {"data.split.by": "name", "data.cache_dir": str(tmp_path / "cache")}
    options["data.tfds.data_dir"] = str(tmp_path / "sets")
    for name, source in {"files": folder, "set": "tfds:byte_files/mine"}.items():
        runs.train(runs.tiny_config(source, **options), tmp_path / name)
        arguments = "--output=out.json", f"--cache_dir={tmp_path / 'cache'}"
        assert runs.run_main("eval", f"--workdir={tmp_path / name}", *arguments) == 0
        (tmp_path / "out.json").rename(tmp_path / f"{name}.json")
    files, prepared = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("files", "set"))
    for report in (files, prepared):
        del report["dataset"], report["bytes_per_second"]
    assert files == prepared
    losses = [
        [record.get("bits_per_byte") for record in runs.records(tmp_path / name)]
        for name in ("files", "set")
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 6


@pytest.mark.parametrize(
    "arguments, flag", [([], b"--num_bytes"), (["prepare"], b"--config")], ids=str
)
def test_help_is_shown_without_waiting_for_jax(arguments, flag):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['__main__.py', *{arguments}, '--help']\n"
        "try: runpy.run_module('megabyte_jax.data', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n"
        "    print(sorted({'jax', 'flax', 'matplotlib', 'tensorflow_datasets'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True)
    assert done.stdout.endswith(b"[]\n"), done.stderr
    assert flag in done.stdout and b"python -m megabyte_jax.data DATASET" in done.stdout
