"""Continues text, an image or sound: generate.py --workdir=DIR --prompt=TEXT --num_bytes=N.

What the bytes stand for is the run's config.data.modality. Text, or bytes of any kind, are shown as
they come. An image is completed from its first rows (--prompt_file, --prompt_rows) and a sound
continued (--prompt_file, --prompt_seconds), into --output=FILE.png or FILE.wav. A prompt gets the
size or rate of the run in the same way as its data do. See --help.
"""

import dataclasses
import os
import sys

from absl import flags
from ml_collections import ConfigDict

from megabyte_jax import cli
from megabyte_jax.data import media
from megabyte_jax.errors import DataError, UserError
from megabyte_jax.text import printable_stream

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty to start a document.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file to continue, instead of --prompt.")
PROMPT_ROWS = flags.DEFINE_integer("prompt_rows", None, "Rows kept of an image; default: half.")
PROMPT_SECONDS = flags.DEFINE_float("prompt_seconds", None, "Seconds of sound kept; default: all.")
NUM_BYTES = flags.DEFINE_integer(
    "num_bytes", None, "How many to make; default: 256, or one second of sound. Images are whole."
)
OUTPUT = flags.DEFINE_string("output", None, "A file for what is made, instead of stdout.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest byte each time.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k likeliest bytes only.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the likeliest that reach p together.")
MIN_P = flags.DEFINE_float("min_p", None, "Leave out bytes below this part of the likeliest's.")
STOP = flags.DEFINE_string("stop", None, "Text after which to stop; it ends what is made.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same bytes.")

# Flags that not every modality has.
ONLY_WITH = {
    "prompt": ["bytes"],
    "stop": ["bytes"],
    "prompt_rows": ["image"],
    "prompt_seconds": ["audio"],
    "num_bytes": ["bytes", "audio"],
}
NEED_FILE = ["prompt_rows", "prompt_seconds"]


def check_flags(modality: str) -> None:
    """Refuses flags that this modality or the other flags leave without a meaning."""
    for name, modalities in ONLY_WITH.items():
        flag = flags.FLAGS[name]
        if flag.present and modality not in modalities:
            raise UserError(
                f"--{name}={flag.value}: accepted where config.data.modality is "
                f"{' or '.join(modalities)}; that of this run is {modality}"
            )
        if flag.present and name in NEED_FILE and PROMPT_FILE.value is None:
            raise UserError(f"--{name}={flag.value}: accepted with --prompt_file only")
    if PROMPT.value and PROMPT_FILE.value is not None:
        raise UserError(f"--prompt={PROMPT.value!r}: accepted is this or --prompt_file, not both")
    suffix = media.SUFFIXES[modality]
    if modality != "bytes" and not (OUTPUT.value or "").lower().endswith(suffix):
        raise UserError(f"--output={OUTPUT.value}: accepted is a file that ends in {suffix}")


def read_file(path: str) -> bytes:
    """The contents of the prompt file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(
            f"--prompt_file={path}: {error.strerror}; accepted is a readable file"
        ) from None


def plan_bytes() -> tuple[bytes, int]:
    """The bytes to continue, and how many are to follow them."""
    path = PROMPT_FILE.value
    prompt = os.fsencode(PROMPT.value) if path is None else read_file(path)
    return prompt, 256 if NUM_BYTES.value is None else NUM_BYTES.value


def read_media(path: str, data: ConfigDict, patch_size: int) -> bytes:
    """What the model reads of a prompt file: all of the image or of the sound in it."""
    try:
        return media.from_file(read_file(path), f"--prompt_file={path}", data, patch_size)
    except DataError as error:  # here the file is an option
        raise UserError(str(error)) from None


def plan_image(data: ConfigDict, patch_size: int) -> tuple[bytes, int]:
    """The bytes of the rows that are kept, and how many complete the image."""
    from megabyte_jax.data import images

    image, size = data.image, media.unit(data)
    if PROMPT_FILE.value is None:
        return b"", size
    prompt = read_media(PROMPT_FILE.value, data, patch_size)
    side = images.block_side(image.scan, patch_size)
    rows = image.height // 2 // side * side if PROMPT_ROWS.value is None else PROMPT_ROWS.value
    if not 0 <= rows <= image.height or rows % side:
        raise UserError(
            f"--prompt_rows={rows}: accepted is a multiple of {side} from 0 to {image.height}"
        )
    kept = rows * size // image.height
    return prompt[:kept], size - kept


def plan_audio(data: ConfigDict, patch_size: int) -> tuple[bytes, int]:
    """The bytes of the sound that is kept, and how many are to follow them."""
    from megabyte_jax.data import audio

    sample_rate = data.audio.sample_rate
    num_bytes = audio.SAMPLE_BYTES * sample_rate if NUM_BYTES.value is None else NUM_BYTES.value
    if num_bytes % audio.SAMPLE_BYTES:
        raise UserError(f"--num_bytes={num_bytes}: accepted is a multiple of {audio.SAMPLE_BYTES}")
    if PROMPT_FILE.value is None:
        return b"", num_bytes
    samples = read_media(PROMPT_FILE.value, data, patch_size)
    length = len(samples) / audio.SAMPLE_BYTES / sample_rate
    seconds = length if PROMPT_SECONDS.value is None else PROMPT_SECONDS.value
    if not 0 <= seconds <= length:
        raise UserError(
            f"--prompt_seconds={seconds}: accepted is from 0 to {length}, the length of "
            f"--prompt_file={PROMPT_FILE.value}"
        )
    return samples[: audio.SAMPLE_BYTES * round(seconds * sample_rate)], num_bytes


def main() -> None:
    """Makes bytes after the prompt, and shows or writes them."""
    # Here and not above, so that --help does not wait for JAX.
    from tqdm import tqdm

    from megabyte_jax import generation, run_config, trained
    from megabyte_jax.sampling import Sampling

    config = run_config.load(WORKDIR.value)
    patch_size = run_config.validate(config).patch_size
    check_flags(config.data.modality)
    if config.data.modality == "image":
        prompt, num_bytes = plan_image(config.data, patch_size)
    elif config.data.modality == "audio":
        prompt, num_bytes = plan_audio(config.data, patch_size)
    else:
        prompt, num_bytes = plan_bytes()
    sampling = Sampling(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        seed=SEED.value,
    )
    stop = None if STOP.value is None else os.fsencode(STOP.value)
    generation.check_length(num_bytes, stop)
    model = trained.load(WORKDIR.value)
    if OUTPUT.value is not None:
        cli.require_writable("--output", OUTPUT.value)
    made = model.stream(prompt, num_bytes, **dataclasses.asdict(sampling), stop=stop)
    print("compiling ...", file=sys.stderr)
    if OUTPUT.value is not None:
        progress = tqdm(made, total=num_bytes, unit="B", unit_scale=True, disable=None)
        contents = b"".join(progress)
        if config.data.modality != "bytes":
            contents = media.encode(prompt + contents, config.data, patch_size)
        cli.write_file("--output", OUTPUT.value, contents)
        return
    for text in printable_stream(made):
        sys.stdout.buffer.write(text.encode())  # UTF-8 whatever the locale
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    cli.run(main)
