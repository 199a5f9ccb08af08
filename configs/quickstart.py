"""Learns the source code of Python's standard library in about three minutes on two CPU cores.

It ends near 1.8 bits per byte on the held-out test split (README.md says where that was measured).

train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = base.get_config()
    block: dict[str, Any] = {"norm": "rmsnorm", "activation": "relu2", "bias": False, "rope": True}
    config.model = base.model(
        MegabyteConfig(
            seq_len=512,
            patch_size=8,
            global_model=TransformerConfig(
                dim=256, num_layers=4, num_heads=4, scan_unroll=4, **block
            ),
            local_model=TransformerConfig(
                dim=128, num_layers=2, num_heads=4, scan_unroll=2, **block
            ),
            byte_positions=False,
            init="scaled",
            dtype="float32",
        )
    )
    config.train.update(batch_size=4, num_bytes=1_600_000)
    config.optimizer.update(
        name="muon", learning_rate=8e-3, schedule="cosine", end_fraction=0.02, warmup_steps=50
    )
    config.log_interval = 100
    config.eval.update(interval=0, batch_size=32, num_bytes=100_000)
    config.sample.update(interval=0, prompt="def ", temperature=0.8)
    config.checkpoint.interval = 200
    return config
