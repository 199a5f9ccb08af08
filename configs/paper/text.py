"""The paper's text models: configs/paper/text.py:SIZE, as 758m_262m, 1.3b_350m or 921m_350m_....

    train.py --config=configs/paper/text.py:758m_262m --workdir=DIR --config.data.source=PATH

All five text sets of the paper (PG-19, Stories, Books, arXiv, Code) use these settings, 80 billion
bytes each: sequences of 8,192 bytes, batches of 48, a peak rate of 2e-4, a linear decay to zero
after 500 updates. The 1.3b_350m model of the PG-19 table saw 400 billion bytes. The paper contradicts
itself on cross-patch attention in its arXiv model (758m_262m with, or 921m_350m_no_cross_patch): both
are here.
"""

from ml_collections import ConfigDict

from configs import base
from megabyte_jax.models.presets import paper_model


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, one of `megabyte_jax.models.presets.PAPER_MODELS`."""
    config = base.get_config()
    config.model = base.model(paper_model(size))
    return config
