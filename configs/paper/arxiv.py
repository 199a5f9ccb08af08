"""arXiv, LaTeX sources: 91.5 GB, a mean document of 58,518 bytes.

    train.py --config=configs/paper/arxiv.py:SIZE --workdir=DIR

The paper: 0.678 bits per byte for 758m_262m in its main table, yet 0.6871 in its ablation, where
0.6781 is 921m_350m_no_cross_patch: either two rows are swapped or the headline model has no
cross-patch attention. Both are here, and 704m_262m_cnn with the convolutional patch encoder.

The set is not in TFDS's catalogue and the paper's was never published; give a directory with
--config.data.source, or prepare your own under the name that stands here:

    python -m megabyte_jax.data prepare arxiv DIR --config=configs/paper/arxiv.py
"""

from ml_collections import ConfigDict

from configs.paper import text


def get_config(size: str = "758m_262m") -> ConfigDict:
    """Returns the config of a size, see `configs/paper/text.py`."""
    config = text.get_config(size)
    config.data.source = "tfds:byte_files/arxiv"
    return config
