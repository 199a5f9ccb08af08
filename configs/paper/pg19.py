"""PG-19, books from before 1919: 10.1 GB, a mean document of 411,404 bytes.

    train.py --config=configs/paper/pg19.py:SIZE --workdir=DIR

The paper: 1.000 bits per byte with 758m_262m after 80 GB; 0.991 with 1.3b_218m; 0.908 (test, basic)
with its best model after 400 GB, which its text calls 758m_262m and its table 1.3b_350m. The table
is followed here: 1.3b_350m gets 400 GB. 760m_262m and 350m_290m are the ratios of table 11.

TFDS has the set; to prepare it needs TensorFlow, the extra `tf`.
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "tfds:pg19"
    config.data.tfds.feature = "book_text"
    if size == "1.3b_350m":
        config.train.num_bytes = 400_000_000_000
    return config
