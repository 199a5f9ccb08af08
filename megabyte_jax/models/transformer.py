"""Pre-norm transformer blocks, stacked and scanned: both the global and the local model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from megabyte_jax.models.attention import attention, rope, with_previous
from megabyte_jax.models.config import TransformerConfig
from megabyte_jax.models.layers import LayerMaker

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops elements of x with probability `rate`; without a key nothing is dropped."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


class Attention(nnx.Module):
    """Multi-head causal self-attention inside groups, see `attention.attention`."""

    def __init__(self, config: TransformerConfig, previous: int, make: LayerMaker) -> None:
        """Takes the arguments of `Transformer`."""
        D, d, H, N = config.dim, config.head_width, config.num_heads, config.kv_heads
        bias, L = config.bias, config.num_layers
        self.config, self.previous = config, previous
        self.query = make.linear(D, H * d, bias=bias)
        self.key = make.linear(D, N * d, bias=bias)
        self.value = make.linear(D, N * d, bias=bias)
        self.out = make.stream_linear(H * d, D, bias=bias, num_layers=L)
        if config.qk_norm:
            self.query_norm, self.key_norm = make.rms_norm(d), make.rms_norm(d)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, G, T, D] -> [B, G, T, D]; `key` drops attention weights."""
        config, T = self.config, x.shape[2]
        q = self.query(x).reshape(*x.shape[:-1], config.num_heads, -1)  # [B, G, T, H, d]
        k = self.key(x).reshape(*x.shape[:-1], config.kv_heads, -1)
        v = self.value(x).reshape(*x.shape[:-1], config.kv_heads, -1)
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        k, v = with_previous(k, self.previous), with_previous(v, self.previous)
        if config.rope:
            q, k = rope(q, jnp.arange(T)), rope(k, jnp.arange(-self.previous, T))
        y = attention(q, k, v, dropout=config.dropout, key=key)
        return self.out(y.reshape(*x.shape[:-1], -1))


class FeedForward(nnx.Module):
    """Position-wise feed-forward layer, gated if the activation is swiglu."""

    def __init__(self, config: TransformerConfig, make: LayerMaker) -> None:
        """Takes the arguments of `Transformer`."""
        D, hidden, bias, L = config.dim, config.hidden_dim, config.bias, config.num_layers
        self.activation = config.activation
        self.up = make.linear(D, hidden, bias=bias)
        if config.activation == "swiglu":
            self.gate = make.linear(D, hidden, bias=bias)
        self.down = make.stream_linear(hidden, D, bias=bias, num_layers=L)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        h = self.up(x)
        match self.activation:
            case "relu":
                h = jax.nn.relu(h)
            case "relu2":
                h = jnp.square(jax.nn.relu(h))
            case "gelu":
                h = jax.nn.gelu(h)
            case "swiglu":
                h = jax.nn.silu(self.gate(x)) * h
        return self.down(h)


class Block(nnx.Module):
    """Attention and feed-forward, each normalised first and added to the residual stream."""

    def __init__(self, config: TransformerConfig, previous: int, make: LayerMaker) -> None:
        """Takes the arguments of `Transformer`."""
        self.dropout = config.dropout
        self.attention_norm = make.norm(config)
        self.attention = Attention(config, previous, make)
        self.mlp_norm = make.norm(config)
        self.mlp = FeedForward(config, make)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, G, T, D] -> [B, G, T, D]; `key` is the randomness of the dropout."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        weights_key, attention_key, mlp_key = keys
        y = self.attention(self.attention_norm(x), weights_key)
        x = x + dropped(y, self.dropout, attention_key)
        return x + dropped(self.mlp(self.mlp_norm(x)), self.dropout, mlp_key)


class Transformer(nnx.Module):
    """A stack of blocks and a final normalisation; each weight of a block has a leading axis L."""

    def __init__(self, config: TransformerConfig, previous: int, make: LayerMaker) -> None:
        """Makes the stack.

        Args:
            config: its sizes and switches.
            previous: how many last positions r of the group before each group also sees.
            make: makes its layers.
        """

        def block(key: jax.Array) -> Block:
            return Block(config, previous, dataclasses.replace(make, rngs=nnx.Rngs(key)))

        self.config = config
        self.blocks = jax.vmap(block)(jax.random.split(make.rngs(), config.num_layers))
        self.norm = make.norm(config)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Runs the stack.

        Args:
            x: [B, G, T, D], G groups of T positions, causal inside each.
            key: randomness of the dropout; None turns dropout off.

        Returns:
            [B, G, T, D].
        """

        def apply(x: jax.Array, layer: tuple[Block, jax.Array | None]) -> tuple[jax.Array, None]:
            block, key = layer
            return block(x, key), None

        if self.config.remat != "none":
            policy = _REMAT_POLICIES[self.config.remat]
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=False)
        L = self.config.num_layers
        keys = None if key is None else jax.random.split(key, L)
        unroll = min(self.config.scan_unroll, L)
        x, _ = jax.lax.scan(apply, x, (self.blocks, keys), unroll=unroll)
        return self.norm(x)
