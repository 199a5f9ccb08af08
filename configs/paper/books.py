"""Books: 79.7 GB, a mean document of 509,526 bytes.

    train.py --config=configs/paper/books.py:SIZE --workdir=DIR

The paper: 1.007 bits per byte with 758m_262m after 80 GB.

The set is not in TFDS's catalogue and the paper's was never published; give a directory with
--config.data.source, or prepare your own under the name that stands here:

    python -m megabyte_jax.data prepare books DIR --config=configs/paper/books.py
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "tfds:byte_files/books"
    return config
