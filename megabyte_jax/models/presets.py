"""Named settings: the two blocks, and the models of the paper (section 5 of its tables).

The paper names a transformer by its nominal GPT-3 size prorated by layers, not by its count of
parameters. "D" there is the width of the whole model, so a byte of the global model gets D / P.
Where P does not divide the stated width (ImageNet64, P = 12) the nearest multiple of P is taken
and the stated heads keep their width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megabyte_jax.errors import UserError
from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, TransformerConfig

# Switches of `TransformerConfig`. Rotary positions in the paper's local model come with its
# cross-patch attention (section 2.3.2) and are set with the models below.
BLOCKS: dict[str, dict[str, Any]] = {
    "paper": {"norm": "layernorm", "activation": "relu", "bias": True, "dropout": 0.1},
    "modern": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "qk_norm": True,
        "rope": True,
    },
}

# Heads by width (table "common sizes"); altered layer counts keep the heads of their width.
_HEADS = {768: 12, 1024: 16, 1536: 16, 2048: 32, 2560: 32, 4096: 32}


def paper_transformer(dim: int, num_layers: int, *, rope: bool = False) -> TransformerConfig:
    """A stack of the paper: its block, its heads for the width, rematerialised."""
    return TransformerConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=_HEADS[dim],
        rope=rope,
        remat="full",
        **BLOCKS["paper"],
    )


def _paper(
    seq_len: int,
    patch_size: int,
    global_size: tuple[int, int],
    local_size: tuple[int, int],
    **switches: Any,
) -> MegabyteConfig:
    global_model = paper_transformer(*global_size)
    if global_model.dim % patch_size:
        width = round(global_model.dim / patch_size) * patch_size
        global_model = dataclasses.replace(
            global_model, dim=width, head_dim=global_model.head_width
        )
    return MegabyteConfig(
        seq_len=seq_len,
        patch_size=patch_size,
        global_model=global_model,
        local_model=paper_transformer(*local_size, rope=switches.get("cross_patch") != 0),
        **switches,
    )


# Name -> (T, P, (D, L) of the global model, (D, L) of the local model, switches).
_PAPER_MODELS: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "758m_262m": (8192, 8, (2048, 14), (1024, 18), {}),
    "704m_262m_cnn": (8192, 8, (2048, 13), (1024, 18), {"conv_kernels": (3, 5, 7)}),
    "921m_350m_no_cross_patch": (8192, 8, (2048, 17), (1024, 24), {"cross_patch": 0}),
    "1.3b_350m": (8192, 8, (2048, 24), (1024, 24), {}),
    "1.3b_218m": (8192, 8, (2048, 24), (1024, 15), {}),
    "760m_262m": (8192, 8, (1536, 24), (1024, 18), {}),
    "350m_290m": (8192, 8, (1024, 24), (1024, 20), {}),
    "image64_1.3b_1.3b": (12_288, 12, (2048, 24), (2048, 24), {}),
    "image64_2.7b_350m": (12_288, 12, (2560, 32), (1024, 24), {}),
    "image256_125m_125m": (196_608, 192, (768, 12), (768, 12), {}),
    "image256_125m_125m_cnn": (196_608, 192, (768, 12), (768, 12), {"conv_kernels": (3, 5, 7)}),
    "image256_250m_156m_no_cross_patch": (196_608, 192, (768, 24), (768, 15), {"cross_patch": 0}),
    "image256_125m_114m_p48": (196_608, 48, (768, 12), (768, 11), {}),
    "image256_125m_83m_p768": (196_608, 768, (768, 12), (768, 8), {}),
    "image640_125m_83m": (1_228_800, 192, (768, 12), (768, 8), {}),
    "audio_350m_125m": (524_288, 32, (1024, 24), (768, 12), {}),
    "audio_350m_125m_cnn": (524_288, 32, (1024, 24), (768, 12), {"conv_kernels": (3, 5, 7)}),
    "audio_350m_146m_no_cross_patch": (524_288, 32, (1024, 24), (768, 14), {"cross_patch": 0}),
}

# Name -> (T, D, L), after table 13; table 4 has a context of 1,024 for ImageNet64 too.
_PAPER_BASELINES = {
    "320m": (1024, 1024, 22),
    "350m": (1024, 1024, 24),
    "image64_760m": (2048, 1536, 24),
    "image256_62m": (1024, 768, 6),
    "image640_83m": (1024, 768, 8),
    "audio_135m": (1024, 768, 13),
}

PAPER_MODELS = tuple(_PAPER_MODELS)
PAPER_BASELINES = tuple(_PAPER_BASELINES)


def paper_model(name: str) -> MegabyteConfig:
    """A MEGABYTE of the paper's tables 6, 10, 11 and 13.

    Args:
        name: one of `PAPER_MODELS`: task if not text, global size, local size, variation.

    Returns:
        Its config, with the paper's block, dropout, initialisation and bfloat16 computation.

    Raises:
        UserError: no model has that name.
    """
    _require_name(name, PAPER_MODELS)
    seq_len, patch_size, global_size, local_size, switches = _PAPER_MODELS[name]
    return _paper(seq_len, patch_size, global_size, local_size, **switches)


def paper_baseline(name: str) -> ByteTransformerConfig:
    """A byte-level Transformer of the paper's tables 5 (350m, of the generation speed) and 13.

    Args:
        name: one of `PAPER_BASELINES`: task if not text, and size.

    Returns:
        Its config, with the same block, dropout, initialisation and dtype as the models.

    Raises:
        UserError: no baseline has that name.
    """
    _require_name(name, PAPER_BASELINES)
    seq_len, dim, num_layers = _PAPER_BASELINES[name]
    return ByteTransformerConfig(seq_len=seq_len, transformer=paper_transformer(dim, num_layers))


def _require_name(name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise UserError(f"size={name!r}: accepted is one of {', '.join(names)}")
