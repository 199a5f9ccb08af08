"""Evaluates a run: eval.py --workdir=DIR [--split=test] [--data=PATH] [--strategy=basic] ..."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from megabyte_jax import cli, foreign
from megabyte_jax.errors import UserError

if TYPE_CHECKING:  # so that --help does not wait for JAX
    from ml_collections import ConfigDict

    from megabyte_jax.data.corpus import Corpus

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
SPLIT = flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Which part of its data.")
DATA = flags.DEFINE_string(
    "data", None, "Other data to evaluate, all of it: a file, directory, ..."
)
MAX_BAD_RECORDS = flags.DEFINE_integer(
    "max_bad_records",
    None,
    "Records that may be left out, in place of the run's data.max_bad_records.",
    lower_bound=0,
)
CACHE_DIR = flags.DEFINE_string(
    "cache_dir", "", "Where decoded images and sound are kept; by default ~/.cache/megabyte_jax."
)
STRATEGY = flags.DEFINE_string(
    "strategy", "basic", "basic, sliding, strided or sliding_strided; the last costs most."
)
STRIDE = flags.DEFINE_integer(
    "stride",
    None,
    "Bytes from one window to the next where they slide: a multiple of the patch size, by default "
    "half the context.",
)
OUTPUT = flags.DEFINE_string(
    "output", None, "The JSON file; by default one in DIR/eval/. The plot lies beside it, as .png."
)
PROCESSES = cli.define_processes()


def main() -> None:
    """Evaluates, prints a table, writes JSON and a plot."""
    # Here and not above, so that --help does not wait for JAX.
    import jax

    from megabyte_jax import distributed, evaluation, plots, run_config, sharding, text, trained

    distributed.start(*(flag.value for flag in PROCESSES))
    mesh = sharding.make_mesh({**dict.fromkeys(sharding.AXES, 1), "fsdp": -1}, jax.devices())
    strategy, stride = STRATEGY.value, STRIDE.value
    with distributed.together():
        config = run_config.load(WORKDIR.value)
        model_config = run_config.validate(config)
        evaluation.check_strategy(model_config, strategy, stride)
        documents, split, name = open_documents(config, model_config.patch_size)
    model = trained.load(WORKDIR.value, mesh=mesh)
    output = OUTPUT.value
    if output is None:
        workdir = Path(WORKDIR.value)
        output = str(workdir / "eval" / f"{name}-{strategy}.json")
        for suffix in (".json", ".png"):  # the links of a work directory are not the user's
            foreign.require_inside(workdir, Path(output).with_suffix(suffix))
    cli.require_writable("--output", output)
    plot = Path(output).with_suffix(".png")
    if output.lower().endswith(".png"):
        raise UserError(f"--output={output}: accepted is a file that can be written and no .png")
    cli.require_writable("--output", plot)

    print(f"compiling, then evaluating {documents.num_bytes:,} bytes ...", flush=True)
    with jax.set_mesh(mesh):
        result = evaluation.evaluate(
            model.config,
            model.params,
            documents,
            config.eval.batch_size,
            strategy=strategy,
            stride=stride,
        )
    if not distributed.is_primary():
        return
    report = evaluation.report(
        result,
        words=text.count_words(documents) if config.data.modality == "bytes" else 0,
        modality=config.data.modality,
        bad_records=documents.bad_records,
        dataset=documents.name,
        split=split,
        step=model.step,
    )
    for name, value in report.items():
        print(f"{name:28}{shown(value)}")
    cli.write_file("--output", plot, plots.loss_by_position(report))
    print(f"plotted in {plot}")
    cli.write_file("--output", output, (json.dumps(report, indent=2) + "\n").encode())
    print(f"written to {output}")


def open_documents(config: ConfigDict, patch_size: int) -> tuple[Corpus, str, str]:
    """The documents that the flags name, which split they are, and the name of their report."""
    from megabyte_jax.data import datasets

    if MAX_BAD_RECORDS.value is not None:
        config.data.max_bad_records = MAX_BAD_RECORDS.value
    # A work directory may come from anyone: what it names is read, not written to or downloaded.
    config.data.cache_dir = CACHE_DIR.value
    if DATA.value is None:
        split = name = SPLIT.value
        (documents,) = datasets.open_splits(config.data, (split,), patch_size, download=False)
    elif flags.FLAGS["split"].present:
        raise UserError(f"--split={SPLIT.value}: accepted is this or --data, which has no splits")
    else:
        documents = datasets.open_all(DATA.value, config.data, patch_size, "--data")
        # Not the name of a split, whatever the data are called.
        split, name = "all", "data-" + re.sub(r"\W+", "_", DATA.value).strip("_")
    documents.verify()
    return documents, split, name


def shown(value: object) -> str:
    """A value of the report as the table shows it."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.4f}"
        case int():
            return f"{value:,}"
        case list() if len(value) > 32:
            return f"{len(value):,} figures, see the plot"
        case list():
            return " ".join(map(shown, value))
    return str(value)


if __name__ == "__main__":
    cli.run(main)
