"""Sound as 16-bit samples, 16,000 per second: sequences of 524,288 bytes, 16.4 seconds.

    train.py --config=configs/paper/audio.py:SIZE --workdir=DIR

The data come from TFDS; a folder of your own that has train/, valid/ and test/ is

    --config.data.source=DIR --config.data.split.train=train --config.data.split.valid=valid
    --config.data.split.test=test

The paper: 3.477 bits per byte with audio_350m_125m on 2 TB of its own, about 18,000 hours. SIZE is
that one, a variation (`megabyte_jax.models.presets`), or `small` for one GPU of 16 GB, or `tiny`
for a CPU.

Where the paper is silent or contradicts itself:
- the batch is 32 sequences in its text and 256 in its table: the text is followed, 16.8 million
  bytes per update;
- the budget is not stated: 80 billion bytes, as of text;
- the order of the two bytes of a sample and headers are not stated: little-endian, no header;
- the data are "Librilight-L" in one place and not named in others: here LibriSpeech, the nearest
  that TFDS has. Its recordings are whole documents, packed one after another.
"""

from ml_collections import ConfigDict

from configs import base, enwik8, quickstart
from megabyte_jax.errors import UserError
from megabyte_jax.models.presets import PAPER_MODELS, paper_model

SIZES = ("small", "tiny", *(name for name in PAPER_MODELS if name.startswith("audio")))


def get_config(size: str = "audio_350m_125m") -> ConfigDict:
    """Returns the config of a size."""
    if size == "tiny":
        config = quickstart.get_config()
        config.model.update(seq_len=8192, patch_size=16)
        config.model.global_model.update(dim=128, num_layers=3, num_heads=2)
        config.model.local_model.update(dim=64, num_layers=2, num_heads=2)
        config.train.update(batch_size=3, num_bytes=0, num_steps=200)
    elif size == "small":
        config = enwik8.get_config()
        config.model.update(seq_len=131_072, patch_size=32)
        config.model.global_model.update(dim=768, num_layers=12, dropout=0.0, remat="full")
        config.model.local_model.update(
            dim=256, num_layers=4, num_heads=4, dropout=0.0, remat="full"
        )
        config.train.batch_size = config.eval.batch_size = 1
    elif size in SIZES:
        config = base.get_config()
        config.model = base.model(paper_model(size))
        config.train.batch_size = config.eval.batch_size = 32
    else:
        raise UserError(f"size={size!r}: accepted is one of {', '.join(SIZES)}")
    config.data.modality = "audio"
    config.data.source = "tfds:librispeech"
    config.data.tfds.feature = "speech"
    config.data.split.update(
        by="name",
        train="train_clean100+train_clean360+train_other500",
        valid="dev_clean+dev_other",
        test="test_clean+test_other",
    )
    config.sample.update(prompt="", num_bytes=32_000)
    return config
