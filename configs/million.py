"""Sequences of a million bytes and more: configs/million.py:SIZE.

    train.py --config=configs/million.py:SIZE --workdir=DIR --config.data.source=PATH
    plan.py --config=configs/million.py:SIZE --topology=v5p:4x4x4

SIZE is one of
- `text`: 1,048,576 bytes of text in patches of 64, with the stacks of the paper's 1.3B/350M model;
- `image640`: the paper's images of 640 x 640 pixels, 1,228,800 bytes (configs/paper/imagenet.py);
- `text_tiny` and `image640_tiny`: as long, for a CPU; `text_tiny` reads the standard library.

The local model and the loss take some 65,000 bytes at a time, so that memory beyond the parameters
grows with T only by the bytes, their embeddings and the activations of the global model (docs/
scaling.md has the formula). The paper has no text model of this length: the patch of 64, near
T^(1/3) = 102, the batch of 8 sequences and r = 64 are ours.
"""

from ml_collections import ConfigDict

from configs import base, quickstart
from configs.paper import imagenet
from megabyte_jax.errors import UserError
from megabyte_jax.models.presets import paper_model

SIZES = ("text", "image640", "text_tiny", "image640_tiny")


def get_config(size: str = "text") -> ConfigDict:
    """Returns the config of a size."""
    if size == "text":
        config = base.get_config()
        config.model = base.model(paper_model("1.3b_350m"))
        config.model.update(seq_len=2**20, patch_size=64, group_size=1024)
        config.train.batch_size = config.eval.batch_size = 8
        config.data.source = "data"
        config.data.split.by = "name"
    elif size == "image640":
        config = imagenet.get_config("image640_125m_83m")
        config.model.group_size = 400
    elif size == "text_tiny":
        config = quickstart.get_config()
        _shrink(config, 128, seq_len=2**20, patch_size=64, group_size=1024)
        config.eval.num_bytes = 10_000  # each document, however short, costs a whole sequence
    elif size == "image640_tiny":
        config = imagenet.get_config("image640_small")
        config.optimizer = quickstart.get_config().optimizer
        config.model.update(quickstart.get_config().model)
        _shrink(config, 192, seq_len=1_228_800, patch_size=192, group_size=400)
    else:
        raise UserError(f"size={size!r}: accepted is one of {', '.join(SIZES)}")
    return config


def _shrink(config: ConfigDict, global_dim: int, **sizes: int) -> None:
    """Makes it a model of some million parameters, trained for 50 updates of a sequence each."""
    config.model.update(sizes)
    for stage, dim in ((config.model.global_model, global_dim), (config.model.local_model, 64)):
        stage.update(dim=dim, num_layers=2, num_heads=2, scan_unroll=1, remat="full")
    config.train.update(batch_size=1, num_bytes=0, num_steps=50)
    config.optimizer.warmup_steps = 5
    config.eval.update(batch_size=1, num_bytes=sizes["seq_len"])
    config.log_interval = 1
