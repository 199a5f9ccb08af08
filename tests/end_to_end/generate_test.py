import json
import os
import shutil
import wave

import numpy as np
import pytest
from PIL import Image

from megabyte_jax import load
from megabyte_jax.data import audio, images
from megabyte_jax.text import printable
from tests import runs


def generate(capfd, workdir, *arguments):
    """What generate.py writes to stdout."""
    assert runs.run_main("generate", f"--workdir={workdir}", *arguments) == 0
    out, err = capfd.readouterr()
    assert err == "compiling ...\n"
    return out


def test_the_bytes_are_those_of_the_public_function(finished_run, capfd):
    arguments = ["--num_bytes=30", "--temperature=0.9", "--top_k=200", "--top_p=0.95", "--seed=3"]
    out = generate(capfd, finished_run, "--prompt=été", *arguments)
    expected = load(finished_run).generate("été".encode(), 30, 0.9, 200, 0.95, 3)
    assert out == printable(expected) + "\n"


def test_an_empty_prompt_starts_a_document_and_no_bytes_are_none(finished_run, capfd):
    assert generate(capfd, finished_run, "--num_bytes=0") == "\n"
    out = generate(capfd, finished_run, "--num_bytes=5")
    assert out == printable(load(finished_run).generate(b"", 5)) + "\n"


def test_a_stop_string_ends_the_output_and_min_p_of_one_is_greedy(finished_run, capfd):
    greedy = load(finished_run).generate(b"a", 20, temperature=0)
    arguments = ["--prompt=a", "--num_bytes=20", "--min_p=1"]
    assert generate(capfd, finished_run, *arguments) == printable(greedy) + "\n"
    stop = os.fsdecode(greedy[3:5])
    end = greedy.index(greedy[3:5]) + 2
    out = generate(capfd, finished_run, *arguments, f"--stop={stop}")
    assert out == printable(greedy[:end]) + "\n"


@pytest.mark.parametrize("prompt", [b"", b"\xff\x00\n", bytes(range(256))])
def test_a_prompt_may_come_from_a_file_of_any_bytes(finished_run, tmp_path, capfd, prompt):
    (tmp_path / "prompt").write_bytes(prompt)
    out = generate(capfd, finished_run, f"--prompt_file={tmp_path}/prompt", "--num_bytes=4")
    assert out == printable(load(finished_run).generate(prompt, 4)) + "\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--num_bytes=-1"], ["--num_bytes=-1", "at least 0"]),
        (["--num_bytes=many"], ["--num_bytes=many", "int"]),
        (["--temperature=-1"], ["--temperature=-1.0", "at least 0"]),
        (["--temperature=nan"], ["--temperature=nan", "at least 0"]),
        (["--top_k=0"], ["--top_k=0", "1 to 256"]),
        (["--top_p=1.5"], ["--top_p=1.5", "at most 1"]),
        (["--min_p=2"], ["--min_p=2.0", "from 0 to 1"]),
        (["--stop="], ["--stop=b''", "1 to num_bytes=256"]),
        (["--stop=abc", "--num_bytes=2"], ["--stop=b'abc'", "1 to num_bytes=2"]),
        (["--seed=-1"], ["--seed=-1", "2**32"]),
        (["--prompt_file=/no/such"], ["--prompt_file=/no/such", "accepted is a readable file"]),
        (["--prompt_file=/proc"], ["--prompt_file=/proc", "accepted is a readable file"]),
        (["--prompt=a", "--prompt_file=b"], ["--prompt='a'", "not both"]),
        (["--workdir=/no/such"], ["--workdir=/no/such", "a run of train.py"]),
    ],
    ids=lambda x: x[0],
)
def test_a_mistake_is_one_line(finished_run, capfd, arguments, named):
    before = runs.contents(finished_run)
    assert runs.run_main("generate", f"--workdir={finished_run}", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("generate.py: error: ") and err.count("\n") == 1
    assert all(part in err for part in named), err
    assert runs.contents(finished_run) == before


def test_the_bytes_go_to_a_file_as_they_are(finished_run, tmp_path, capfd):
    arguments = ["--prompt=a", "--num_bytes=30", f"--output={tmp_path}/new/made"]
    assert generate(capfd, finished_run, *arguments) == ""
    made = load(finished_run).generate(b"a", 30)
    assert runs.contents(tmp_path) == {"new": None, "new/made": made}


def test_a_link_to_the_output_stays_one_and_a_device_is_refused(finished_run, tmp_path, capfd):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    generate(capfd, finished_run, "--num_bytes=3", f"--output={tmp_path}/link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").stat().st_size == 3
    for path in ("/dev/null", tmp_path):
        refused(capfd, finished_run, f"--output={path}", f"--output={path}: accepted is a file")


def refused(capfd, workdir, *arguments_and_message):
    *arguments, message = arguments_and_message
    assert runs.run_main("generate", f"--workdir={workdir}", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1, err


HEIGHT, WIDTH, RATE = 6, 4, 10


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """The work directory of a run on images."""
    directory = tmp_path_factory.mktemp("images")
    for seed in range(20):
        image_file(directory / f"{seed}.png", noise(seed))
    config = runs.tiny_config(
        directory,
        **{
            "model.seq_len": HEIGHT * WIDTH * 3,
            "model.patch_size": 12,
            "model.global_model.dim": 24,
        },
        **{"data.modality": "image", "data.image.height": HEIGHT, "data.image.width": WIDTH},
        **{"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "train.num_steps": 3},
    )
    workdir = tmp_path_factory.mktemp("image_run") / "run"
    runs.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def audio_run(finished_run, tmp_path_factory):
    """The work directory of a run whose config says that its bytes are sound."""
    workdir = tmp_path_factory.mktemp("audio_run") / "run"
    shutil.copytree(finished_run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"].update(modality="audio", audio={"sample_rate": RATE})
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def image_file(path, pixels=None):
    Image.fromarray(noise(99) if pixels is None else pixels).save(path, "PNG")
    return f"--prompt_file={path}"


def completed(capfd, workdir, folder, *arguments):
    """The pixels of the image that generate.py writes."""
    assert generate(capfd, workdir, f"--output={folder}/made.png", *arguments) == ""
    with Image.open(folder / "made.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


@pytest.mark.parametrize("rows, kept", [(None, 2), (0, 0), (4, 4), (6, 6)])
def test_an_image_is_completed_below_the_rows_that_are_kept(image_run, tmp_path, capfd, rows, kept):
    arguments = [image_file(tmp_path / "prompt.png"), "--seed=5"]
    arguments += [] if rows is None else [f"--prompt_rows={rows}"]
    made = completed(capfd, image_run, tmp_path, *arguments)
    assert made.shape == (HEIGHT, WIDTH, 3) and np.array_equal(made[:kept], noise(99)[:kept])
    prompt = images.to_bytes(noise(99)[:kept], "patch", 12)
    data = prompt + load(image_run).generate(prompt, HEIGHT * WIDTH * 3 - len(prompt), seed=5)
    assert np.array_equal(made, images.to_pixels(data, HEIGHT, WIDTH, "patch", 12))
    assert {path.name for path in tmp_path.iterdir()} == {"prompt.png", "made.png"}


def test_an_image_of_another_size_is_resized_as_the_data_of_the_run_are(image_run, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(image_run, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["image"]["resize"] = "nearest"
    (workdir / "config.json").write_text(json.dumps(config))
    large = image_file(tmp_path / "large.png", noise(99).repeat(3, 0).repeat(3, 1))
    made = completed(capfd, workdir, tmp_path, large, "--prompt_rows=4")
    assert made.shape == (HEIGHT, WIDTH, 3) and np.array_equal(made[:4], noise(99)[:4])


def test_an_image_is_made_from_nothing_and_the_seed_decides_which(image_run, tmp_path, capfd):
    first, again, other = (
        completed(capfd, image_run, tmp_path, f"--seed={seed}") for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def sound_file(path, samples, rate=RATE):
    path.write_bytes(audio.encode(samples, rate))
    return f"--prompt_file={path}"


@pytest.mark.parametrize(
    "arguments, kept, made",
    [([], 16, 20), (["--prompt_seconds=0.3", "--num_bytes=4"], 6, 4), (["--num_bytes=0"], 16, 0)],
    ids=lambda x: str(x),
)
def test_a_sound_is_continued(audio_run, tmp_path, capfd, arguments, kept, made):
    prompt = bytes(range(16))
    arguments = [*arguments, sound_file(tmp_path / "a.wav", prompt), f"--output={tmp_path}/b.wav"]
    assert generate(capfd, audio_run, *arguments) == ""
    with wave.open(str(tmp_path / "b.wav")) as file:
        assert file.getparams()[:4] == (1, 2, RATE, (kept + made) // 2)
        data = file.readframes(file.getnframes())
    assert data == prompt[:kept] + load(audio_run).generate(prompt[:kept], made)


def test_a_sound_of_another_rate_is_continued_at_that_of_the_run(audio_run, tmp_path, capfd):
    arguments = [sound_file(tmp_path / "a.wav", b"\xe8\x03" * 800, 10 * RATE), "--num_bytes=4"]
    assert generate(capfd, audio_run, *arguments, f"--output={tmp_path}/b.wav") == ""
    with wave.open(str(tmp_path / "b.wav")) as file:
        assert file.getparams()[:4] == (1, 2, RATE, 80 + 2)
        kept = np.frombuffer(file.readframes(80), "<i2")
    assert np.abs(kept - 1000)[20:-20].max() < 10


def test_a_sound_is_made_from_nothing(audio_run, tmp_path, capfd):
    assert generate(capfd, audio_run, f"--output={tmp_path}/b.wav") == ""
    made = load(audio_run).generate(b"", 2 * RATE)
    assert (tmp_path / "b.wav").read_bytes() == audio.encode(made, RATE)


@pytest.fixture
def files(tmp_path):
    """A folder of prompts, good and bad."""
    image_file(tmp_path / "good.png")
    image_file(tmp_path / "turned.png", noise(0).swapaxes(0, 1))
    sound_file(tmp_path / "good.wav", bytes(16))
    sound_file(tmp_path / "fast.wav", bytes(16), 44100)
    (tmp_path / "text").write_text("no image and no sound")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--output="], "--output=: accepted is a file that ends in .png"),
        (["--output=a.jpg"], "--output=a.jpg: accepted is a file that ends in .png"),
        (["--output=/proc/no/a.png"], "--output=/proc/no/a.png: accepted is a file that can be"),
        (["--prompt=a"], "--prompt=a: accepted where config.data.modality is bytes; that of this"),
        (["--stop=a"], "--stop=a: accepted where config.data.modality is bytes; that of this run"),
        (["--num_bytes=3"], "--num_bytes=3: accepted where config.data.modality is bytes or audio"),
        (["--prompt_seconds=1"], "accepted where config.data.modality is audio; that of this run"),
        (["--prompt_rows=2"], "--prompt_rows=2: accepted with --prompt_file only"),
        (["--prompt_file=good.png", "--prompt_rows=3"], "accepted is a multiple of 2 from 0 to 6"),
        (["--prompt_file=good.png", "--prompt_rows=8"], "--prompt_rows=8: accepted is a multiple"),
        (["--prompt_file=good.png", "--prompt_rows=-2"], "--prompt_rows=-2: accepted is a"),
        (["--prompt_file=good.png", "--temperature=-1"], "--temperature=-1.0: accepted is"),
        (["--prompt_file=turned.png"], "--prompt_file=turned.png: has 4 x 6 pixels"),
        (["--prompt_file=text"], "--prompt_file=text: no image or a damaged one; accepted is"),
        (["--prompt_file=good.wav"], "--prompt_file=good.wav: no image or a damaged one"),
        (["--prompt_file=none"], "--prompt_file=none: No such file"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_a_mistake_about_an_image_is_one_line_and_leaves_no_file(
    image_run, files, capfd, monkeypatch, arguments, named
):
    monkeypatch.chdir(files)
    before = runs.contents(files)
    refused(capfd, image_run, "--output=new/made.png", *arguments, named)
    assert runs.contents(files) == before


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--output=a.png"], "--output=a.png: accepted is a file that ends in .wav"),
        (["--prompt=a"], "--prompt=a: accepted where config.data.modality is bytes"),
        (["--prompt_rows=2"], "accepted where config.data.modality is image; that of this run is"),
        (["--num_bytes=3"], "--num_bytes=3: accepted is a multiple of 2"),
        (["--num_bytes=-2"], "--num_bytes=-2: accepted is"),
        (["--prompt_seconds=1"], "--prompt_seconds=1.0: accepted with --prompt_file only"),
        (["--prompt_file=good.wav", "--prompt_seconds=0.9"], "accepted is from 0 to 0.8, the leng"),
        (["--prompt_file=good.wav", "--prompt_seconds=nan"], "--prompt_seconds=nan: accepted is"),
        (["--prompt_file=fast.wav"], "--prompt_file=fast.wav: holds no sound; accepted is at leas"),
        (["--prompt_file=good.png"], "--prompt_file=good.png: no WAV or FLAC file"),
        (["--prompt_file=text"], "--prompt_file=text: no WAV or FLAC file"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_a_mistake_about_a_sound_is_one_line_and_leaves_no_file(
    audio_run, files, capfd, monkeypatch, arguments, named
):
    monkeypatch.chdir(files)
    before = runs.contents(files)
    refused(capfd, audio_run, "--output=new/made.wav", *arguments, named)
    assert runs.contents(files) == before


def test_an_interrupt_leaves_the_old_output(finished_run, tmp_path, capfd, monkeypatch):
    def interrupted(*_, **__):
        yield b"a"
        raise KeyboardInterrupt

    (tmp_path / "made").write_text("old")
    monkeypatch.setattr("megabyte_jax.trained.TrainedModel.stream", interrupted)
    arguments = [f"--workdir={finished_run}", f"--output={tmp_path}/made"]
    assert runs.run_main("generate", *arguments) == 130
    assert capfd.readouterr().err.endswith("generate.py: error: interrupted\n")
    assert runs.contents(tmp_path) == {"made": b"old"}


def test_a_failed_write_is_one_line_and_leaves_no_file(finished_run, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    arguments = [f"--workdir={finished_run}", "--num_bytes=2", f"--output={tmp_path}/made"]
    assert runs.run_main("generate", *arguments) == 2
    line = f"generate.py: error: --output={tmp_path}/made: No space left on device; accepted is"
    assert capfd.readouterr().err.splitlines()[1].startswith(line)
    assert runs.contents(tmp_path) == {}
