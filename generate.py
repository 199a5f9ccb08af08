"""Continues a prompt: generate.py --workdir=DIR --prompt=TEXT --num_bytes=N, see --help."""

import os
import sys

from absl import flags

from megabyte_jax import cli
from megabyte_jax.errors import UserError
from megabyte_jax.text import printable_stream

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty to start a document.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file to continue, instead of --prompt.")
NUM_BYTES = flags.DEFINE_integer("num_bytes", 256, "How many bytes to make.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest byte each time.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample among the k likeliest bytes only.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample among the likeliest that reach p together.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same bytes.")


def read_prompt() -> bytes:
    """The bytes that the flags say to continue."""
    if PROMPT_FILE.value is None:
        return os.fsencode(PROMPT.value)
    if PROMPT.value:
        raise UserError(f"--prompt={PROMPT.value!r}: accepted is this or --prompt_file, not both")
    try:
        with open(PROMPT_FILE.value, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(
            f"--prompt_file={PROMPT_FILE.value}: {error.strerror}; accepted is a readable file"
        ) from None


def main() -> None:
    """Writes the bytes after the prompt on stdout as they come, what is not text as escapes."""
    # Here and not above, so that --help does not wait for JAX.
    from megabyte_jax import generation, trained

    settings = NUM_BYTES.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value
    generation.check_sampling(*settings)
    prompt = read_prompt()
    made = trained.load(WORKDIR.value).stream(prompt, *settings)
    print("compiling ...", file=sys.stderr)
    for text in printable_stream(made):
        sys.stdout.buffer.write(text.encode())  # UTF-8 whatever the locale
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    cli.run(main)
