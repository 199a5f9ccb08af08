"""The layers every model is made of, with the model's initialisation and dtype."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from megabyte_jax.models.config import TransformerConfig
from megabyte_jax.sharding import constrain

_PAPER_STD = 0.006
# Scale at which the residual streams start with `scaled`. Adam's steps do not depend on the size
# of a weight, so embeddings that start smaller are learnt faster; 0.3 was best of 1, 0.3 and 0.1.
STREAM_SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class LayerMaker:
    """Makes layers; their parameters are float32 and their computation is in `dtype`.

    Random weights are normal, cut at two standard deviations and not rescaled for that (section
    A.1 of the paper), which jax.nn.initializers would do.

    Attributes:
        init: `paper` or `scaled`, see `MegabyteConfig.init`.
        dtype: of the computation.
        rngs: source of the initial weights.
        stacked: whether the blocks of a stack are one, with a leading axis L, or a list.
    """

    init: str
    dtype: str
    rngs: nnx.Rngs
    stacked: bool = True

    def normal(self, std: float, *shape: int) -> jax.Array:
        """Draws float32 weights of a shape."""
        return std * jax.random.truncated_normal(self.rngs(), -2.0, 2.0, shape)

    def byte_table(self, *shape: int) -> nnx.Param:
        """An embedding of the byte values, of shape [V, D]."""
        return nnx.Param(self.normal(self._std(1, STREAM_SCALE), *shape))

    def vectors(self, *shape: int) -> nnx.Param:
        """Trainable pads and positions, of shape [..., D]."""
        return nnx.Param(self.normal(self._std(shape[-1], STREAM_SCALE), *shape))

    def linear(self, fan_in: int, fan_out: int, *, bias: bool) -> nnx.Linear:
        """A linear layer; its bias, if it has one, starts at zero."""
        return self._linear(fan_in, fan_out, bias, self._std(fan_in))

    def stream_linear(
        self, fan_in: int, fan_out: int, *, bias: bool, num_layers: int = 0
    ) -> nnx.Linear:
        """A linear layer whose output is added to a residual stream.

        Args:
            fan_in: input width.
            fan_out: output width.
            bias: whether it has a bias, which starts at zero.
            num_layers: L of its stack, two of whose such layers add to the stream each: their
                weights are divided by sqrt(2 L), so that the variance does not grow with depth.
        """
        std = self._std(fan_in, STREAM_SCALE) / math.sqrt(2 * num_layers or 1)
        return self._linear(fan_in, fan_out, bias, std)

    def _std(self, fan_in: int, scale: float = 1.0) -> float:
        return _PAPER_STD if self.init == "paper" else scale * fan_in**-0.5

    def _linear(self, fan_in: int, fan_out: int, bias: bool, std: float) -> nnx.Linear:
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
            config.dim,
            use_bias=config.bias,
            use_fast_variance=False,  # which cancels where the mean is large
            dtype=jnp.dtype(self.dtype),
            rngs=self.rngs,
        )

    def rms_norm(self, dim: int) -> nnx.RMSNorm:
        """RMS normalisation over the last axis, of width `dim`."""
        return nnx.RMSNorm(dim, dtype=jnp.dtype(self.dtype), rngs=self.rngs)


def cross_entropy(logits: jax.Array, x: jax.Array) -> jax.Array:
    """Negative log-likelihood in nats: float32 [..., V] and uint8 [...] -> float32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, x.astype(jnp.int32))


def embed(table: nnx.Param, x: jax.Array) -> jax.Array:
    """Looks bytes up: [V, D] and uint8 [...] -> [..., D].

    The table is brought together first, as it is small and a lookup in a split one is not.
    """
    return constrain(table[...], None, None)[x]


def shift(x: jax.Array, first: jax.Array | float, axis: int) -> jax.Array:
    """Moves the elements of x on by one along an axis; `first` enters, the last is dropped.

    A rotation, so that where the axis is split over devices only its ends are sent.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    is_first = jnp.arange(x.shape[axis]).reshape(shape) == 0
    return jnp.where(is_first, first, jnp.roll(x, 1, axis))


def tied_logits(h: jax.Array, table: nnx.Param, init: str) -> jax.Array:
    """Logits of the byte values from the embedding of them (equation 6).

    Args:
        h: [..., D].
        table: [V, D], as `LayerMaker.byte_table` made it.
        init: of the model; logits of `scaled` start at a scale of 1.

    Returns:
        float32 [..., V].
    """
    head = constrain(table[...].astype(h.dtype), None, None)
    logits = jnp.einsum("...d,vd->...v", h, head, preferred_element_type=jnp.float32)
    return logits / (STREAM_SCALE * math.sqrt(h.shape[-1])) if init == "scaled" else logits
