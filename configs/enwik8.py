"""enwik8, the first 100,000,000 bytes of a Wikipedia dump: 90 / 5 / 5 million bytes in order.

    train.py --config=configs/enwik8.py --workdir=runs/enwik8 --config.data.source=enwik8.gz

Nothing is downloaded; unpacked, the file's sha256 is
2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8. The size `base`, 63 million
parameters, is meant for one GPU or TPU and 20 epochs, and has not been run to its end by us. The
size `small`, configs/enwik8.py:small, is the quickstart's, for a CPU: benchmarks/enwik8_prefix.py.
"""

from ml_collections import ConfigDict

from configs import base, quickstart
from megabyte_jax.errors import UserError
from megabyte_jax.models.config import MegabyteConfig, TransformerConfig
from megabyte_jax.models.presets import BLOCKS


def get_config(size: str = "base") -> ConfigDict:
    """Returns the config of a size, base or small."""
    if size == "base":
        config = base.get_config()
        block = {**BLOCKS["modern"], "dropout": 0.1, "remat": "dots"}
        config.model = base.model(
            MegabyteConfig(
                seq_len=8192,
                patch_size=8,
                global_model=TransformerConfig(dim=768, num_layers=8, num_heads=12, **block),
                local_model=TransformerConfig(dim=384, num_layers=4, num_heads=6, **block),
                byte_positions=False,
                init="scaled",
            )
        )
        config.train.update(batch_size=16, num_bytes=1_800_000_000)
        config.optimizer.update(learning_rate=1e-3, schedule="cosine")
    elif size == "small":
        config = quickstart.get_config()
        config.model.seq_len = 1024
        config.train.batch_size = 8
        config.sample.prompt = ""
    else:
        raise UserError(f"--config=configs/enwik8.py:{size}: accepted is base or small")
    config.data.source = "enwik8"
    config.data.split.by = "bytes"
    return config
