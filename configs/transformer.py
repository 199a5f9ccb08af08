"""The byte-level Transformer that MEGABYTE is measured against.

    train.py --config=configs/transformer.py:small --workdir=DIR

`small` and `small_window` are the quickstart with another model: they compute 0.98 and 1.00 times
its forward FLOPs per byte (flops.py), at its context. The other sizes are the paper's, with its
batch size and rate, named as in `megabyte_jax.models.presets`; they want --config.data.source=PATH,
a directory of train/, valid/ and test/. For `350m` the paper gives no settings: it gets `320m`'s.
"""

from ml_collections import ConfigDict

from configs import base, quickstart
from megabyte_jax.errors import UserError
from megabyte_jax.models.config import ByteTransformerConfig, TransformerConfig
from megabyte_jax.models.presets import PAPER_BASELINES, paper_baseline

# Width, layers and window.
_SMALL = {"small": (144, 2, 0), "small_window": (120, 4, 64)}
# Batch size and peak rate, where they are not those of text.
_SETTINGS = {
    "image64_760m": (512, 3e-4),
    "image256_62m": (1536, 2e-4),
    "image640_83m": (4800, 3e-4),
    "audio_135m": (2048, 2e-4),
}


def get_config(size: str = "small") -> ConfigDict:
    """Returns the config of a size."""
    if size in _SMALL:
        config = quickstart.get_config()
        dim, num_layers, window = _SMALL[size]
        block = config.model.local_model.to_dict()
        block.update(dim=dim, num_layers=num_layers, scan_unroll=num_layers)
        config.model = base.model(
            ByteTransformerConfig(
                seq_len=config.model.seq_len,
                transformer=TransformerConfig(**block),
                window=window,
                byte_positions=config.model.byte_positions,
                init=config.model.init,
                dtype=config.model.dtype,
            )
        )
        return config
    if size not in PAPER_BASELINES:
        accepted = ", ".join((*_SMALL, *PAPER_BASELINES))
        raise UserError(f"size={size!r}: accepted is one of {accepted}")
    config = base.get_config()
    config.model = base.model(paper_baseline(size))
    config.data.source = "data"
    config.data.split.by = "name"
    config.train.batch_size, config.optimizer.learning_rate = _SETTINGS.get(size, (72, 2e-4))
    return config
