"""Books: 79.7 GB, a mean document of 509,526 bytes.

    train.py --config=configs/paper/books.py:SIZE --workdir=DIR --config.data.source=PATH

The paper: 1.007 bits per byte with 758m_262m after 80 GB.
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "books"
    return config
