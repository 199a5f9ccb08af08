"""The layers every model is made of, with the model's initialisation and dtype."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.config import TransformerConfig

_PAPER_STD = 0.006


@dataclasses.dataclass(frozen=True)
class LayerMaker:
    """Makes layers; their parameters are float32 and their computation is in `dtype`.

    Random weights are normal, cut at two standard deviations and not rescaled for that (section
    A.1 of the paper), which jax.nn.initializers would do.

    Attributes:
        init: `paper` or `unit`, see `MegabyteConfig.init`.
        dtype: of the computation.
        rngs: source of the initial weights.
    """

    init: str
    dtype: str
    rngs: nnx.Rngs

    def normal(self, std: float, *shape: int) -> jax.Array:
        """Draws float32 weights of a shape."""
        return std * jax.random.truncated_normal(self.rngs(), -2.0, 2.0, shape)

    def byte_table(self, *shape: int) -> nnx.Param:
        """An embedding of the byte values, of shape [V, D]."""
        return nnx.Param(self.normal(_PAPER_STD if self.init == "paper" else 1.0, *shape))

    def vectors(self, *shape: int) -> nnx.Param:
        """Trainable pads and positions, of shape [..., D]."""
        std = _PAPER_STD if self.init == "paper" else shape[-1] ** -0.5
        return nnx.Param(self.normal(std, *shape))

    def linear(
        self, fan_in: int, fan_out: int, *, bias: bool, residual_layers: int = 0
    ) -> nnx.Linear:
        """A linear layer.

        Args:
            fan_in: input width.
            fan_out: output width.
            bias: whether it has a bias, which starts at zero.
            residual_layers: L of the stack if the layer writes to its residual stream: the
                weights are then divided by sqrt(2 L), so that depth does not add variance.
        """
        std = _PAPER_STD if self.init == "paper" else fan_in**-0.5
        std /= math.sqrt(2 * residual_layers or 1)
        return nnx.Linear(
            fan_in,
            fan_out,
            use_bias=bias,
            kernel_init=lambda _, shape, dtype: self.normal(std, *shape).astype(dtype),
            dtype=jnp.dtype(self.dtype),
            rngs=self.rngs,
        )

    def norm(self, config: TransformerConfig) -> nnx.LayerNorm | nnx.RMSNorm:
        """The normalisation of a stack, over its width; statistics are float32."""
        if config.norm == "rmsnorm":
            return self.rms_norm(config.dim)
        return nnx.LayerNorm(
            config.dim, use_bias=config.bias, dtype=jnp.dtype(self.dtype), rngs=self.rngs
        )

    def rms_norm(self, dim: int) -> nnx.RMSNorm:
        """RMS normalisation over the last axis, of width `dim`."""
        return nnx.RMSNorm(dim, dtype=jnp.dtype(self.dtype), rngs=self.rngs)
