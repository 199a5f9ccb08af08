"""How fast a small model learns the first 4,154,399 bytes of enwik8.

    python -m benchmarks.enwik8_prefix --data=enwik8_prefix_4154399.gz --optimizer=muon

Trains on the first 3,900,000 bytes for 500 updates of 8 x 1,024 bytes (4.1 MB, a little over an
epoch) and evaluates on the 204,800 bytes after them, 200 windows of 1,024, every 100 updates. This
is not an enwik8 score: the standard test is the last 5,000,000 of 100,000,000 bytes.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax

import train
from benchmarks import machine
from configs import enwik8
from megabyte_jax import flops, run_config
from megabyte_jax.models import functional

LEARNING_RATES = {"adamw": 4e-3, "muon": 8e-3}


def main() -> None:
    """Trains, and writes the curve to benchmarks/results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", required=True, help="the prefix, plain or compressed")
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="muon")
    options = parser.parse_args()
    config = enwik8.get_config("small")
    config.data.source = options.data
    config.data.split.update(valid_size=204_800.0, test_size=49_599.0)
    config.train.update(num_steps=500, num_bytes=0)
    rate = LEARNING_RATES[options.optimizer]
    config.optimizer.update(name=options.optimizer, learning_rate=rate, warmup_steps=50)
    config.eval.update(interval=100, num_bytes=0, batch_size=8)
    model = run_config.validate(config)
    with tempfile.TemporaryDirectory() as workdir:
        train.train(config, workdir)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    params = jax.eval_shape(lambda: functional.init_params(model, jax.random.key(0)))
    name = config.data.source = Path(options.data).name
    report = {
        **machine.description(
            f"python -m benchmarks.enwik8_prefix --data={name} --optimizer={options.optimizer}"
        ),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "forward_flops_per_byte": flops.forward_flops_per_byte(model),
        "training_seconds": sum(
            config.log_interval * 8192 / r["bytes_per_second"]
            for r in records
            if "bytes_per_second" in r
        ),
        "curve": [
            {"bytes_seen": r["step"] * 8192, "bits_per_byte": r["eval/bits_per_byte"]}
            for r in records
            if "eval/bits_per_byte" in r
        ],
        "config": config.to_dict(),
    }
    path = Path(__file__).parent / "results" / f"enwik8_prefix_{options.optimizer}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["curve"]), f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
