"""The patch embedder: bytes to the inputs of the global model, shifted by one patch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig
from megabyte_jax.models.layers import LayerMaker


class CausalConvolution(nnx.Module):
    """One layer of the convolutional patch encoder: x + relu(conv(x)), looking back only.

    The paper gives the widths and that it is causal (section 2.3.1); the residual and the
    activation are ours.
    """

    def __init__(self, dim: int, kernel: int, make: LayerMaker) -> None:
        """Makes a convolution over `kernel` bytes that keeps the width `dim`."""
        self.kernel = kernel
        self.mix = make.linear(kernel * dim, dim, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D_G] -> [B, T, D_G]."""
        T = x.shape[1]
        past = jnp.pad(x, ((0, 0), (self.kernel - 1, 0), (0, 0)))
        taps = [past[:, i : i + T] for i in range(self.kernel)]
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
        h = self._embed(x, jnp.arange(T)[None])
        for convolution in self.convolutions:
            h = convolution(h)
        h = h.reshape(B, T // config.patch_size, -1)  # [B, K, P * D_G]
        pad = jnp.broadcast_to(self.pad[...].astype(h.dtype), (B, 1, h.shape[-1]))
        return jnp.concatenate([pad, h[:, :-1]], axis=1)

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
        h = self._embed(jnp.take_along_axis(x, positions, axis=1), positions)  # [B, reach, D_G]
        for convolution in self.convolutions:
            # Before the sequence every convolution sees zeros, whatever the one before it adds.
            h = convolution(jnp.where(exists, h, 0))
        h = h[:, reach - P :].reshape(x.shape[0], -1)
        return jnp.where((k > 0)[:, None], h, self.pad[...].astype(h.dtype)[None])

    def _embed(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """uint8 [B, T] at int [B or 1, T] -> [B, T, D_G]."""
        h = self.byte_embedding[x]
        if self.config.byte_positions:
            h = h + self.position_embedding[positions]
        return h.astype(self.config.dtype)
