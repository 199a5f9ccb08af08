"""enwik8, the first 100,000,000 bytes of a Wikipedia dump: 90 / 5 / 5 million bytes in order.

    train.py --config=configs/enwik8.py --workdir=runs/enwik8 --config.data.source=enwik8.gz

The file is not downloaded; its sha256 is
2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8 (unpacked).
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the config."""
    config = quickstart.get_config()
    config.model.seq_len = 1024
    config.data.source = "enwik8"
    config.data.split = ConfigDict({"by": "bytes", "valid_size": 0.05, "test_size": 0.05})
    return config
