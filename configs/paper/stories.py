"""Stories, a subset of CommonCrawl: 21.3 GB, a mean document of 35,265 bytes.

    train.py --config=configs/paper/stories.py:SIZE --workdir=DIR --config.data.source=PATH

The paper: 0.978 bits per byte with 758m_262m after 80 GB.
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "stories"
    return config
