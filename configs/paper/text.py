"""The paper's text models on any data: configs/paper/text.py:SIZE, as 758m_262m or 1.3b_350m.

    train.py --config=configs/paper/text.py:758m_262m --workdir=DIR --config.data.source=PATH

All five text sets of the paper use these settings: 80 billion bytes in sequences of 8,192, batches
of 48, a peak rate of 2e-4 and a linear decay to zero after 500 updates (tables 1, 6 and 13). The
sizes are the names in `megabyte_jax.models.presets`. The data is a directory of train/, valid/ and
test/, with a file per document.
"""

from ml_collections import ConfigDict

from configs import base
from megabyte_jax.models.presets import paper_model


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size."""
    config = base.get_config()
    config.model = base.model(paper_model(size))
    config.data.source = "data"
    config.data.split.by = "folder"
    return config
