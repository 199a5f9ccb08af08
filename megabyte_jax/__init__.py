"""MEGABYTE in JAX: byte-level multiscale transformers, trained, evaluated and sampled.

What is exported here is imported when first used, so that importing the package is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabyte_jax.generation import Decoder, Generated, generate
    from megabyte_jax.models.byte_transformer import ByteTransformer
    from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, TransformerConfig
    from megabyte_jax.models.megabyte import Megabyte
    from megabyte_jax.sampling import Sampling
    from megabyte_jax.trained import TrainedModel, load

__all__ = [
    "ByteTransformer",
    "ByteTransformerConfig",
    "Decoder",
    "Generated",
    "Megabyte",
    "MegabyteConfig",
    "Sampling",
    "TrainedModel",
    "TransformerConfig",
    "generate",
    "load",
]

_MODULES = {
    "ByteTransformer": "megabyte_jax.models.byte_transformer",
    "ByteTransformerConfig": "megabyte_jax.models.config",
    "Decoder": "megabyte_jax.generation",
    "Generated": "megabyte_jax.generation",
    "Megabyte": "megabyte_jax.models.megabyte",
    "MegabyteConfig": "megabyte_jax.models.config",
    "Sampling": "megabyte_jax.sampling",
    "TrainedModel": "megabyte_jax.trained",
    "TransformerConfig": "megabyte_jax.models.config",
    "generate": "megabyte_jax.generation",
    "load": "megabyte_jax.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
