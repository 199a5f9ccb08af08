"""Shows a dataset as the model sees it, or prepares one.

    python -m megabyte_jax.data DATASET --config=configs/NAME.py --config.data.KEY=VALUE

DATASET takes the place of config.data.source. Shows for each split documents, bytes, entropy and
what compressors make of it in bits per byte; then the first batch, as train.py makes it: the
beginnings of its first rows as text, or a PNG of its images or sound.

    python -m megabyte_jax.data prepare NAME SOURCE --config=configs/NAME.py

Writes the documents of SOURCE, files of the config's modality, as a TFDS set with the splits that
the config says, into config.data.tfds.data_dir.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from megabyte_jax import cli
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.errors import EmptySplitError, UserError

BASE = Path(__file__).parents[2] / "configs" / "base.py"
SPLITS = ("train", "valid", "test")
TFDS_NAMES = {"valid": "validation"}


def open_each(
    open_splits: Callable[[Sequence[str]], Sequence[Corpus]],
) -> tuple[dict[str, Corpus], list[str]]:
    """Opens the splits that there are.

    Args:
        open_splits: of names of splits; raises an `EmptySplitError` if there is none of a name.

    Returns:
        The splits by name, train among them, and a line on each of the others that says why.

    Raises:
        UserError: there is nothing to train on.
        DataError: data cannot be read.
    """
    try:
        return dict(zip(SPLITS, open_splits(SPLITS), strict=True)), []
    except EmptySplitError:  # of which split, is seen by opening one after the other
        opened, missing = {"train": open_splits(["train"])[0]}, []
    for name in ("valid", "test"):
        try:
            opened[name] = open_splits([name])[0]
        except EmptySplitError as error:
            missing.append(f"no {name} split: {error}")
    return opened, missing


def say(*lines: str) -> None:
    """Prints lines, as UTF-8 whatever the locale."""
    for line in lines:
        sys.stdout.buffer.write(line.encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def show(source: str) -> None:
    """Prints the statistics of a dataset and shows a batch."""
    # Here and not above, so that --help does not wait for them.
    from megabyte_jax import run_config
    from megabyte_jax.data import datasets, statistics

    config, path = flags.FLAGS.config, flags.FLAGS.picture
    config.data.source = source
    model, data = run_config.validate(config), config.data
    if data.modality != "bytes":
        cli.require_writable("--picture", path)
    elif flags.FLAGS["picture"].present:
        raise UserError(
            f"--picture={path}: accepted where config.data.modality is image or audio; bytes are "
            "shown as text"
        )
    opened, missing = open_each(lambda names: datasets.open_splits(data, names, model.patch_size))
    sampler = datasets.train_windows(config, opened["train"], model.seq_len)
    measured: dict[str, statistics.Statistics | None] = dict.fromkeys(SPLITS)
    for name, corpus in opened.items():
        corpus.verify()
        measured[name] = statistics.measure(
            corpus, data, model.patch_size, flags.FLAGS.num_bytes, name
        )
    say(f"{sampler.corpus.name}, modality {data.modality}", statistics.table(measured), *missing)
    rows = config.train.batch_size
    say(
        f"an epoch is {sampler.num_windows:,} windows of {model.seq_len:,} bytes, "
        f"{sampler.num_windows / rows:,.1f} updates of {rows} windows"
    )
    batch = sampler.batch(0)
    if data.modality == "bytes":
        say(f"the first batch begins, row by row:\n{statistics.excerpt(batch)}")
        return
    cli.write_file("--picture", path, statistics.picture(batch, data, model.patch_size))
    say(f"the first batch is drawn in {path}")


def prepare(command: str, name: str, source: str) -> None:
    """Writes plain files as a TFDS set."""
    from megabyte_jax import run_config
    from megabyte_jax.data import builders
    from megabyte_jax.data.bad_records import BadRecords
    from megabyte_jax.data.splits import split_corpus

    config = flags.FLAGS.config
    config.data.source = source
    run_config.validate(config)
    data, bad = config.data, BadRecords(config.data.max_bad_records)
    whole = open_corpus(source, bad=bad, option="SOURCE")
    opened, missing = open_each(
        lambda names: [split_corpus(whole, split, **data.split) for split in names]
    )
    splits = {TFDS_NAMES.get(split, split): corpus for split, corpus in opened.items()}
    directory = builders.prepare(name, data, splits, data.tfds.data_dir, bad)
    bad.report()
    for split, corpus in splits.items():
        say(f"{split}: {len(corpus):,} documents, {corpus.num_bytes:,} bytes of files")
    say(*missing)
    say(f"written to {directory}; it is trained on with", "    " + options_for(directory))


def options_for(directory: Path) -> str:
    """The options of train.py for a set that was prepared, with any config of its modality."""
    root, made = directory.parents[2], "/".join(directory.parts[-3:-1])
    options = {"source": f"tfds:{made}", "tfds.data_dir": root, "split.by": "name"}
    options |= {f"split.{name}": TFDS_NAMES.get(name, name) for name in SPLITS}
    return shlex.join(f"--config.data.{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    preparing = sys.argv[1:2] == ["prepare"]
    sys.argv[0] = "megabyte_jax.data"  # else messages would begin with __main__.py
    if not any(argument.split("=")[0] in ("--config", "-config") for argument in sys.argv):
        # A default of the flag would be read when it is defined, where no mistake is caught.
        sys.argv.insert(1, f"--config={BASE}")
    config_flags.DEFINE_config_file("config", None, "Default: configs/base.py.", lock_config=True)
    if preparing:
        cli.run(prepare, ("prepare", "NAME", "SOURCE"))
    else:
        flags.DEFINE_integer("num_bytes", 2**24, "To compress of a split, at most.", lower_bound=1)
        flags.DEFINE_string("picture", "batch.png", "A file for the batch of images or sound.")
        cli.run(show, ("DATASET",))
