"""The paper's text models on any data: configs/paper/text.py:SIZE.

    train.py --config=configs/paper/text.py:758m_262m --workdir=DIR --config.data.source=PATH

All five text sets of the paper use these settings: 80 billion bytes in sequences of 8,192, batches
of 48, a peak rate of 2e-4 and a linear decay to zero after 500 updates (tables 1, 6 and 13). The
data are train, valid and test of a directory, with a file per document, or of a TFDS set.

SIZE is one of the paper's (`megabyte_jax.models.presets`, those without the name of another task),
or one of ours: `small`, 63 million parameters of the modern block for one GPU of 16 GB, and `tiny`
for a CPU. The patches of `tiny` are long and its local model does most of the work, so that a few
million bytes of training suffice for it to copy, byte by byte, what repeats within two patches.

Where the paper is silent: documents are packed without a separator, `data.separator` sets one; no
byte marks where one begins; r, the reach of cross-patch attention, is the whole previous patch.
"""

from ml_collections import ConfigDict

from configs import base, enwik8, quickstart
from megabyte_jax.errors import UserError
from megabyte_jax.models.presets import PAPER_MODELS, paper_model

SIZES = ("small", "tiny", *(name for name in PAPER_MODELS if name[0].isdigit()))


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size."""
    if size == "tiny":
        config = quickstart.get_config()
        config.model.update(seq_len=512, patch_size=64)
        config.model.global_model.update(dim=128, num_layers=1, num_heads=2, scan_unroll=1)
        config.model.local_model.update(dim=96, num_layers=3, num_heads=3, scan_unroll=3)
        config.train.num_bytes = 12_000_000
        config.sample.prompt = ""
    elif size == "small":
        config = enwik8.get_config()
        for stage in (config.model.global_model, config.model.local_model):
            stage.update(dropout=0.0, remat="full")
        config.train.batch_size = config.eval.batch_size = 8
    elif size in SIZES:
        config = base.get_config()
        config.model = base.model(paper_model(size))
    else:
        raise UserError(f"size={size!r}: accepted is one of {', '.join(SIZES)}")
    config.data.source = "data"
    config.data.split.by = "name"
    return config
