"""Evaluates a run: eval.py --workdir=DIR [--split=test] [--data=PATH] [--output=FILE]."""

import json
import re
from pathlib import Path

from absl import flags

from megabyte_jax import cli
from megabyte_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
SPLIT = flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Which part of its data.")
DATA = flags.DEFINE_string(
    "data", None, "Other data to evaluate, all of it: a file, directory, ..."
)
OUTPUT = flags.DEFINE_string("output", None, "The JSON file; by default one in DIR/eval/.")


def main() -> None:
    """Evaluates, prints a table and writes JSON."""
    # Here and not above, so that --help does not wait for JAX.
    from megabyte_jax import evaluation, run_config, trained
    from megabyte_jax.data import corpus, splits

    config = run_config.load(WORKDIR.value)
    if DATA.value is None:
        split = name = SPLIT.value
        documents = corpus.open_corpus(config.data.source)
        documents = splits.split_corpus(documents, split, **config.data.split)
    elif flags.FLAGS["split"].present:
        raise UserError(f"--split={SPLIT.value}: accepted is this or --data, which has no splits")
    else:
        documents = corpus.open_corpus(DATA.value, option="--data")
        split, name = "all", re.sub(r"\W+", "_", DATA.value).strip("_")
    model = trained.load(WORKDIR.value)
    output = Path(WORKDIR.value) / "eval" / f"{name}-basic.json"
    if OUTPUT.value is not None:
        output = Path(OUTPUT.value)
    cli.require_writable("output", output)

    print(f"compiling, then evaluating {documents.num_bytes:,} bytes ...", flush=True)
    result = evaluation.evaluate(model.config, model.params, documents, config.eval.batch_size)
    report = evaluation.report(
        result,
        words=evaluation.count_words(documents),
        context=model.config.seq_len,
        dataset=documents.name,
        split=split,
        step=model.step,
    )
    output.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        print(f"{name:28}{shown(value)}")
    print(f"written to {output}")


def shown(value: object) -> str:
    """A value of the report as the table shows it."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.4f}"
        case int():
            return f"{value:,}"
        case list():
            return " ".join(map(shown, value))
    return str(value)


if __name__ == "__main__":
    cli.run(main)
