"""Bytes after a prompt, sampled one at a time from the model's predictions."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax.errors import UserError
from megabyte_jax.models import megabyte
from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig


def filter_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Sharpens logits and removes the unlikely bytes.

    Args:
        logits: float32 [V].
        temperature: float32 [], above 0.
        top_k: int32 [], how many of the likeliest bytes stay.
        top_p: float32 [], the likeliest bytes stay until together they reach this probability;
            the likeliest always stays.

    Returns:
        float32 [V], -inf where a byte is removed.
    """
    logits = (logits - logits.max()) / temperature  # at most 0: a low temperature may overflow
    order = jnp.argsort(-logits)
    probabilities = jax.nn.softmax(logits[order])
    before = jnp.cumsum(probabilities) - probabilities
    kept = (jnp.arange(VOCAB_SIZE) < top_k) & ((before < top_p) | (jnp.arange(VOCAB_SIZE) == 0))
    return jnp.full_like(logits, -jnp.inf).at[order].set(jnp.where(kept, logits[order], -jnp.inf))


@functools.partial(jax.jit, static_argnums=0)
def _next_byte(
    config: MegabyteConfig,
    params: megabyte.Params,
    window: jax.Array,
    length: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Chooses byte `length` of the window uint8 [T] from the bytes before it: uint8 []."""
    # What lies after `length` is not looked at: the prediction of a byte is causal.
    logits = megabyte.logits(config, params, window[None])[0, length]
    filtered = filter_logits(logits, jnp.where(temperature > 0, temperature, 1.0), top_k, top_p)
    sampled = jax.random.categorical(key, filtered)
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits)).astype(jnp.uint8)


def check_sampling(
    num_bytes: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    """Checks the settings of `stream`.

    Raises:
        UserError: one is out of range.
    """
    for name, value, ok, accepted in (
        ("num_bytes", num_bytes, num_bytes >= 0, "a whole number of at least 0"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "a number of at least 0"),
        ("top_k", top_k, top_k is None or 1 <= top_k <= VOCAB_SIZE, "from 1 to 256"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
        ("seed", seed, 0 <= seed < 2**32, "a whole number from 0 to below 2**32"),
    ):
        if not ok:
            raise UserError(f"--{name}={value}: accepted is {accepted}")


def stream(
    config: MegabyteConfig,
    params: megabyte.Params,
    prompt: bytes,
    num_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt, byte by byte.

    The whole context is computed again for every byte. Once it holds seq_len bytes its older half
    is dropped, so that the model always sees between seq_len / 2 and seq_len bytes.

    Args:
        config: the model.
        params: its parameters.
        prompt: bytes to continue, of any length; the empty one starts a document.
        num_bytes: how many to make.
        temperature: 0 takes the likeliest byte, 1 samples from the model's distribution.
        top_k: sample among the k likeliest bytes only.
        top_p: sample among the likeliest bytes that together reach this probability.
        seed: the same seed gives the same bytes.

    Returns:
        Iterator over the bytes after the prompt, 0 to 255.

    Raises:
        UserError: a setting is out of range.
    """
    check_sampling(num_bytes, temperature, top_k, top_p, seed)
    settings = (
        jnp.float32(temperature),
        jnp.int32(VOCAB_SIZE if top_k is None else top_k),
        jnp.float32(1.0 if top_p is None else top_p),
    )
    return _stream(config, params, prompt, num_bytes, settings, jax.random.key(seed))


def _stream(
    config: MegabyteConfig,
    params: megabyte.Params,
    prompt: bytes,
    num_bytes: int,
    settings: tuple[jax.Array, jax.Array, jax.Array],
    key: jax.Array,
) -> Iterator[int]:
    if not num_bytes:
        return
    P, T = config.patch_size, config.seq_len
    size = min(T, -(-(len(prompt) + num_bytes) // P) * P)
    window = np.zeros(size, np.uint8)
    keep = max(T // 2 // P, 1) * P  # context left when the window is full
    context = prompt if len(prompt) < size else prompt[-min(keep, T - 1) :]
    length = len(context)
    window[:length] = np.frombuffer(context, np.uint8)
    for i in range(num_bytes):
        if length == size:
            length = min(keep, T - 1)
            window[:length] = window[size - length :].copy()
        byte_key = jax.random.fold_in(key, i)
        byte = int(_next_byte(config, params, window, jnp.int32(length), byte_key, *settings))
        window[length] = byte
        length += 1
        yield byte
