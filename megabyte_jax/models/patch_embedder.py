"""The patch embedder: bytes to the inputs of the global model, shifted by one patch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig
from megabyte_jax.models.layers import LayerMaker, embed, shift
from megabyte_jax.sharding import constrain


class CausalConvolution(nnx.Module):
    """One layer of the convolutional patch encoder: x + relu(conv(x)), looking back only.

    The paper gives the widths and that it is causal (section 2.3.1); the residual and the
    activation are ours.
    """

    def __init__(self, dim: int, kernel: int, make: LayerMaker) -> None:
        """Makes a convolution over `kernel` bytes that keeps the width `dim`."""
        self.kernel = kernel
        self.mix = make.linear(kernel * dim, dim, bias=True)

    def __call__(self, x: jax.Array, past: jax.Array) -> jax.Array:
        """[..., T, D_G], and the kernel - 1 bytes before it -> [..., T, D_G]."""
        T = x.shape[-2]
        seen = jnp.concatenate([past, x], axis=-2)
        taps = [seen[..., i : i + T, :] for i in range(self.kernel)]
        return x + jax.nn.relu(self.mix(jnp.concatenate(taps, axis=-1)))


class PatchEmbedder(nnx.Module):
    """Embeds bytes, joins those of a patch without loss and shifts by one patch (equations 1, 2).

    Slot k of the result holds patch k - 1, so the global model predicts a patch from the patches
    before it alone; slot 0 is the trainable pad E_gpad.
    """

    def __init__(self, config: MegabyteConfig, make: LayerMaker) -> None:
        """Makes E_gl, E_pos, E_gpad and the convolutions."""
        D, P = config.byte_dim, config.patch_size
        self.config = config
        self.byte_embedding = make.byte_table(VOCAB_SIZE, D)
        if config.byte_positions:
            self.position_embedding = make.vectors(config.seq_len, D)
        self.pad = make.vectors(P * D)
        self.convolutions = nnx.List(
            [CausalConvolution(D, kernel, make) for kernel in config.conv_kernels]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """uint8 [B, T] -> [B, K, P * D_G]."""
        config, (B, T) = self.config, x.shape
        h = self._embed(x)
        h = h.reshape(B, T // config.patch_size, config.patch_size, -1)  # [B, K, P, D_G]
        h = constrain(h, "batch", "patch", None, None)
        for convolution in self.convolutions:
            h = convolution(h, _past(h, convolution.kernel - 1))
        h = h.reshape(*h.shape[:2], -1)  # [B, K, P * D_G]
        h = shift(h, self.pad[...].astype(h.dtype)[None, None], axis=1)
        return constrain(h, "batch", "patch", None)

    def step(self, x: jax.Array, k: jax.Array) -> jax.Array:
        """Makes slot k of the result alone, for each sequence its own.

        Args:
            x: uint8 [B, T], whose bytes before k * P are looked at.
            k: int32 [B].

        Returns:
            [B, P * D_G].
        """
        config, P = self.config, self.config.patch_size
        reach = P + sum(kernel - 1 for kernel in config.conv_kernels)
        positions = k[:, None] * P - reach + jnp.arange(reach)[None]
        exists = (positions >= 0)[..., None]
        positions = jnp.maximum(positions, 0)
        # [B, reach, D_G]
        h = self._embed(jnp.take_along_axis(x, positions, axis=1), positions)
        for convolution in self.convolutions:
            # Before the sequence every convolution sees zeros, whatever the one before it adds.
            h = jnp.where(exists, h, 0)
            past = jnp.zeros((h.shape[0], convolution.kernel - 1, h.shape[2]), h.dtype)
            h = convolution(h, past)
        h = h[:, reach - P :].reshape(x.shape[0], -1)
        return jnp.where((k > 0)[:, None], h, self.pad[...].astype(h.dtype)[None])

    def _embed(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """uint8 [B, T] at int [B, T], or from the first position on -> [B, T, D_G]."""
        h = embed(self.byte_embedding, x)
        if self.config.byte_positions:
            table = constrain(self.position_embedding[...], "patch", None)
            h = h + (table[None, : x.shape[1]] if positions is None else table[positions])
        return h.astype(self.config.dtype)


def _past(x: jax.Array, size: int) -> jax.Array:
    """The bytes before each patch: [B, K, P, D] -> [B, K, size, D], zero before the first."""
    before = x[:, :, :0]
    while before.shape[2] < size:  # patch after patch, of which a wide kernel sees several
        x = shift(x, 0, axis=1)
        before = jnp.concatenate([x, before], axis=2)
    return before[:, :, before.shape[2] - size :]
