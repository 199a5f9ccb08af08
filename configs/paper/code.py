"""Code from GitHub: 353.7 GB, a mean document of 7,461 bytes.

    train.py --config=configs/paper/code.py:SIZE --workdir=DIR

The paper: 0.411 bits per byte with 758m_262m after 80 GB.

The set is not in TFDS's catalogue and the paper's was never published; give a directory with
--config.data.source, or prepare your own under the name that stands here:

    python -m megabyte_jax.data prepare code DIR --config=configs/paper/code.py

Empty files, of which code has many, are left out, up to data.max_bad_records of them.
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "tfds:byte_files/code"
    config.data.max_bad_records = 1_000_000
    return config
