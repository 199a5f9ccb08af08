"""MEGABYTE in JAX: byte-level multiscale transformers, trained, evaluated and sampled.

What is exported here is imported when first used, so that importing the package is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabyte_jax.models.config import MegabyteConfig, TransformerConfig
    from megabyte_jax.models.megabyte import Megabyte
    from megabyte_jax.trained import TrainedModel, load

__all__ = ["Megabyte", "MegabyteConfig", "TrainedModel", "TransformerConfig", "load"]

_MODULES = {
    "Megabyte": "megabyte_jax.models.megabyte",
    "MegabyteConfig": "megabyte_jax.models.config",
    "TrainedModel": "megabyte_jax.trained",
    "TransformerConfig": "megabyte_jax.models.config",
    "load": "megabyte_jax.trained",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
