"""How the next byte is chosen from a model's logits."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megabyte_jax.errors import UserError
from megabyte_jax.models.config import VOCAB_SIZE


class Settings(NamedTuple):
    """`Sampling` as arrays [], so that one program serves them all.

    Attributes:
        temperature: float32.
        top_k: int32, 256 for all bytes.
        top_p: float32, 1 for all.
        min_p: float32, 0 for all.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next byte is chosen from the model's logits.

    Attributes:
        temperature: 0 takes the likeliest byte, 1 samples from the model's distribution.
        top_k: sample among the k likeliest bytes only.
        top_p: sample among the likeliest bytes that together reach this probability, of what the
            model says and not of what top_k leaves.
        min_p: sample among the bytes at least this probable relative to the likeliest.
        seed: of the first prompt, that of the next is one more. Bytes follow from the model, the
            prompt and its seed, whatever else is in the batch, as far as float rounding allows.

    Raises:
        UserError: one is out of range; the message names it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        top_k, top_p, min_p = self.top_k, self.top_p, self.min_p
        whole = [isinstance(x, (int, np.integer)) for x in (top_k or 0, self.seed)]
        for name, ok, accepted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_k", top_k is None or whole[0] and 1 <= top_k <= VOCAB_SIZE, "from 1 to 256"),
            ("top_p", top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
            ("min_p", min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
            ("seed", whole[1] and 0 <= self.seed < 2**32, "a whole number from 0 to below 2**32"),
        ):
            if not ok:
                raise UserError(f"--{name}={getattr(self, name)}: accepted is {accepted}")

    @property
    def settings(self) -> Settings:
        """The same as arrays."""
        return Settings(
            jnp.float32(self.temperature),
            jnp.int32(VOCAB_SIZE if self.top_k is None else self.top_k),
            jnp.float32(1.0 if self.top_p is None else self.top_p),
            jnp.float32(self.min_p or 0.0),
        )


MODEL_DISTRIBUTION = Sampling()


def filter_logits(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Sharpens logits and removes the unlikely bytes.

    Args:
        logits: float32 [B, V].
        temperature: float32 [], above 0.
        top_k: int32 [], how many of the likeliest bytes stay.
        top_p: float32 [], the likeliest bytes stay until together they reach this probability;
            the likeliest always stays.
        min_p: float32 [], bytes stay that are at least this probable relative to the likeliest.

    Returns:
        float32 [B, V], -inf where a byte is removed; never the likeliest, which is at 0.
    """
    likeliest = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(VOCAB_SIZE)[None]
    # At most 0 and then divided, because a low temperature may overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature

    def limited(logits: jax.Array) -> jax.Array:
        # Comparing all pairs is four times faster than sorting, on a CPU too, for 256 kB a row.
        # [B, V, V]: whether the byte of the middle axis comes before that of the last.
        this, other = logits[:, :, None], logits[:, None]
        number = jnp.arange(VOCAB_SIZE)
        ahead = jnp.where((number[:, None] < number[None])[None], this >= other, this > other)
        p = jax.nn.softmax(logits, axis=-1)
        weights = jnp.stack([jnp.ones_like(p), p], axis=1)
        sums = jnp.matmul(weights, ahead.astype(p.dtype), precision="highest")  # [B, 2, V]
        rank, before = sums[:, 0], sums[:, 1]
        # Rounded sums reach 1 before the last byte does.
        kept = (rank < top_k) & ((before < top_p) | (rank == 0) | (top_p >= 1))
        return jnp.where(kept, logits, -jnp.inf)

    needed = (top_k < VOCAB_SIZE) | (top_p < 1)
    kept = jax.lax.cond(needed, limited, lambda logits: logits, logits)
    kept = jnp.where(logits >= jnp.log(min_p), kept, -jnp.inf)
    # By its number: a compiler may compute the largest logit anew, rounded otherwise, and then the
    # difference is not 0.
    return jnp.where(likeliest, 0.0, kept)


def choose(logits: jax.Array, noise: jax.Array, settings: Settings) -> jax.Array:
    """Chooses a byte for each sequence.

    Args:
        logits: float32 [B, V].
        noise: float32 [B, V], from `gumbel_noise`.
        settings: the same for all.

    Returns:
        uint8 [B].
    """
    sampled = settings.temperature > 0
    temperature = jnp.where(sampled, settings.temperature, 1.0)
    filtered = filter_logits(logits, temperature, *settings[1:])
    scores = jnp.where(sampled, filtered + noise, logits)
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


def gumbel_noise(keys: jax.Array, first: jax.Array, P: int) -> jax.Array:
    """The randomness of P bytes, a function of the key and the number of each byte alone.

    Args:
        keys: [B], of each output.
        first: int32 [B], number of the first of the bytes in its output.
        P: how many.

    Returns:
        float32 [B, P, V].
    """

    def one(key: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), (VOCAB_SIZE,))

    return jax.vmap(jax.vmap(one, (None, 0)))(keys, first[:, None] + jnp.arange(P)[None])
