"""Bytes after prompts: sampled from a model patch by patch, with the keys and values kept.

A prompt is read by the parallel forward pass up to its last whole patch; the bytes left over are
run through the decoder again as given ones, so that any mixture of lengths decodes in step, the
global model once per patch and the local one once per byte. A window holds seq_len bytes: when it
is full its older half is dropped and what is left, the last seq_len // 2 bytes, is read again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import VOCAB_SIZE, ModelConfig

_BYTES_PER_CALL = 128  # made before the host looks for a stop string


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next byte is chosen from the model's logits.

    Attributes:
        temperature: 0 takes the likeliest byte, 1 samples from the model's distribution.
        top_k: sample among the k likeliest bytes only.
        top_p: sample among the likeliest bytes that together reach this probability.
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
        for name, ok, accepted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_k", top_k is None or 1 <= top_k <= VOCAB_SIZE, "from 1 to 256"),
            ("top_p", top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
            ("min_p", min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to below 2**32"),
        ):
            if not ok:
                raise UserError(f"--{name}={getattr(self, name)}: accepted is {accepted}")


def check_length(num_bytes: int, stop: bytes | None) -> None:
    """Checks how long an output is to be.

    Raises:
        UserError: num_bytes is below 0, or the stop string is empty or longer than that.
    """
    if num_bytes < 0:
        raise UserError(f"--num_bytes={num_bytes}: accepted is a whole number of at least 0")
    if stop is not None and not 1 <= len(stop) <= num_bytes:
        raise UserError(
            f"--stop={stop!r}: accepted is a string of 1 to num_bytes={num_bytes} bytes"
        )


class Generated(NamedTuple):
    """Bytes made after a prompt.

    Attributes:
        data: N bytes.
        log_probs: float32 [N], the log-likelihood of each in nats, by the model's own
            distribution, before temperature and limits.
    """

    data: bytes
    log_probs: NDArray[np.float32]


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
        float32 [B, V], -inf where a byte is removed.
    """
    # At most 0 and then divided, because a low temperature may overflow.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature

    def limited(logits: jax.Array) -> jax.Array:
        # Comparing all pairs is four times faster than sorting, on a CPU too. [B, V, V]: whether
        # the byte of the middle axis comes before that of the last; of equals the first does.
        this, other = logits[:, :, None], logits[:, None]
        number = jnp.arange(VOCAB_SIZE)
        ahead = jnp.where((number[:, None] < number[None])[None], this >= other, this > other)
        p = jax.nn.softmax(logits, axis=-1)
        weights = jnp.stack([jnp.ones_like(p), p], axis=1)
        sums = jnp.matmul(weights, ahead.astype(p.dtype), precision="highest")  # [B, 2, V]
        rank, before = sums[:, 0], sums[:, 1]
        kept = (rank < top_k) & ((before < top_p) | (rank == 0))
        return jnp.where(kept, logits, -jnp.inf)

    needed = (top_k < VOCAB_SIZE) | (top_p < 1)
    kept = jax.lax.cond(needed, limited, lambda logits: logits, logits)
    return jnp.where(logits >= jnp.log(min_p), kept, -jnp.inf)


class _Settings(NamedTuple):
    """`Sampling` as arrays, so that one program serves them all."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array


def _choose(logits: jax.Array, noise: jax.Array, settings: _Settings) -> jax.Array:
    """Chooses bytes uint8 [B] by logits float32 [B, V], at random by Gumbel noise [B, V]."""
    sampled = settings.temperature > 0
    temperature = jnp.where(sampled, settings.temperature, 1.0)
    filtered = filter_logits(logits, temperature, *settings[1:])
    scores = jnp.where(sampled, filtered + noise, logits)
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


def _noise(keys: jax.Array, first: jax.Array, P: int) -> jax.Array:
    """Gumbel noise float32 [B, P, V] for the bytes from number `first` of each output on."""

    def one(key: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), (VOCAB_SIZE,))

    return jax.vmap(jax.vmap(one, (None, 0)))(keys, first[:, None] + jnp.arange(P)[None])


class _Window(NamedTuple):
    """The windows of a batch and where each of them stands, on the host or on the device.

    Attributes:
        x: uint8 [B, T], the bytes.
        k: int32 [B], whole patches there are.
        given: int32 [B], bytes there are after those.
        made: int32 [B], bytes made in this and earlier windows.
    """

    x: Any
    k: Any
    given: Any
    made: Any


_prefill = jax.jit(functional.prefill, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    config: ModelConfig,
    unstacked: functional.Params,
    cache: Any,
    window: _Window,
    keys: jax.Array,
    settings: _Settings,
    num_patches: jax.Array,
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """Makes patches, as many as asked for up to the N that one call may make.

    Returns:
        The cache; the bytes of the windows uint8 [B, T]; of the patches alone the bytes uint8
        [B, N * P] and their log-likelihoods float32 [B, N * P] in nats.
    """
    P = config.patch_size
    B = window.x.shape[0]
    size = B, _patches_per_call(config) * P
    rows = jnp.arange(B)[:, None]

    def patch(i: jax.Array, carry: Any) -> Any:
        cache, x, made, log_probs = carry
        k = window.k + i
        given = jnp.where(i == 0, window.given, 0)
        noise = _noise(keys, window.made - window.given + i * P, P)
        h, cache = functional.begin_patch(config, unstacked, cache, x, k)
        places = k[:, None] * P + jnp.arange(P)[None]

        def byte(p: jax.Array, carry: Any) -> Any:
            cache, bytes_, scores = carry
            before = bytes_[:, jnp.maximum(p - 1, 0)]
            logits, cache = functional.next_byte(config, unstacked, cache, h, k, p, before)
            chosen = jnp.where(p < given, bytes_[:, p], _choose(logits, noise[:, p], settings))
            score = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)
            return cache, bytes_.at[:, p].set(chosen), scores.at[:, p].set(score[:, 0])

        start = cache, jnp.take_along_axis(x, places, axis=1), jnp.zeros((B, P))
        cache, bytes_, scores = jax.lax.fori_loop(0, P, byte, start)
        made = jax.lax.dynamic_update_slice_in_dim(made, bytes_, i * P, axis=1)
        log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, scores, i * P, axis=1)
        return cache, x.at[rows, places].set(bytes_), made, log_probs

    start = cache, window.x, jnp.zeros(size, jnp.uint8), jnp.zeros(size)
    return jax.lax.fori_loop(0, num_patches, patch, start)


def _patches_per_call(config: ModelConfig) -> int:
    return max(1, _BYTES_PER_CALL // config.patch_size)


class Decoder:
    """Generates from a model, whose parameters it keeps as decoding wants them."""

    def __init__(self, config: ModelConfig, params: functional.Params) -> None:
        """Copies the parameters, kernels in the model's dtype.

        Args:
            config: the model.
            params: as `functional.init_params` makes them.
        """
        self._config, self._params = config, params
        self._unstacked = functional.unstack(config, params)

    def generate(
        self,
        prompts: Sequence[bytes],
        num_bytes: int,
        sampling: Sampling = Sampling(),
        stop: bytes | None = None,
    ) -> list[Generated]:
        """Continues B prompts at once.

        Args:
            prompts: of any lengths; the empty one starts a document.
            num_bytes: how many to make after each, unless it stops before.
            sampling: how bytes are chosen.
            stop: an output ends with the first occurrence of these bytes in it.

        Returns:
            What was made after each prompt.

        Raises:
            UserError: num_bytes or stop is out of range.
        """
        parts = list(self._run(prompts, num_bytes, sampling, stop, _patches_per_call(self._config)))
        return [
            Generated(
                b"".join(part.data for part in row),
                np.concatenate([np.zeros(0, np.float32), *(part.log_probs for part in row)]),
            )
            for row in (zip(*parts, strict=True) if parts else [()] * len(prompts))
        ]

    def stream(
        self,
        prompt: bytes,
        num_bytes: int,
        sampling: Sampling = Sampling(),
        stop: bytes | None = None,
    ) -> Iterator[Generated]:
        """Continues one prompt as `generate` does, and gives each patch as soon as it is made.

        Args:
            prompt: of any length.
            num_bytes: see `generate`.
            sampling: see `generate`.
            stop: see `generate`.

        Returns:
            Iterator over pieces of what `generate` gives.

        Raises:
            UserError: num_bytes or stop is out of range.
        """
        return (part for (part,) in self._run([prompt], num_bytes, sampling, stop, 1))

    def _run(
        self,
        prompts: Sequence[bytes],
        num_bytes: int,
        sampling: Sampling,
        stop: bytes | None,
        patches_per_call: int,
    ) -> Iterator[list[Generated]]:
        check_length(num_bytes, stop)
        outputs = [_Output(num_bytes, stop) for _ in prompts]
        settings = _Settings(
            jnp.float32(sampling.temperature),
            jnp.int32(VOCAB_SIZE if sampling.top_k is None else sampling.top_k),
            jnp.float32(1.0 if sampling.top_p is None else sampling.top_p),
            jnp.float32(sampling.min_p or 0.0),
        )
        seeds = np.arange(sampling.seed, sampling.seed + len(prompts)) % 2**32
        keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
        return self._calls(prompts, outputs, settings, keys, patches_per_call)

    def _calls(
        self,
        prompts: Sequence[bytes],
        outputs: list[_Output],
        settings: _Settings,
        keys: jax.Array,
        patches_per_call: int,
    ) -> Iterator[list[Generated]]:
        """Calls `_decode` until every output is complete; gives what each call adds to them."""
        P, K = self._config.patch_size, self._config.seq_len // self._config.patch_size
        window, cache = self._first_window(prompts)
        while any(rows := np.array([not output.complete for output in outputs], bool)):
            if (full := rows & (window.k >= K)).any():
                window, cache = self._slide(window, cache, full)
            missing = max(
                output.num_bytes - len(output.data) + given
                for output, given in zip(outputs, window.given, strict=True)
                if not output.complete
            )
            n = min(patches_per_call, K - int(window.k[rows].max()), -(-missing // P))
            cache, x, made, log_probs = _decode(
                self._config, self._unstacked, cache, window, keys, settings, np.int32(n)
            )
            made, log_probs = np.asarray(made), np.asarray(log_probs)
            yield [
                output.take(made[i, given : n * P], log_probs[i, given : n * P])
                for i, (output, given) in enumerate(zip(outputs, window.given, strict=True))
            ]
            window = _Window(x, window.k + n, 0 * window.given, window.made + n * P - window.given)

    def _first_window(self, prompts: Sequence[bytes]) -> tuple[_Window, Any]:
        T, B = self._config.seq_len, len(prompts)
        x, lengths = np.zeros((B, T), np.uint8), np.zeros(B, np.int32)
        for i, prompt in enumerate(prompts):
            # A longer prompt is cut to what is left of a window that was full.
            context = prompt if len(prompt) < T else prompt[len(prompt) - T // 2 :]
            x[i, : len(context)] = np.frombuffer(context, np.uint8)
            lengths[i] = len(context)
        k, given = np.divmod(lengths, np.int32(self._config.patch_size))
        return _Window(x, k, given, np.zeros(B, np.int32)), self._read(x, k)

    def _slide(self, window: _Window, cache: Any, full: NDArray[np.bool_]) -> tuple[_Window, Any]:
        """Drops the older half of the windows that are full and reads the rest of them again."""
        T, (B, kept) = self._config.seq_len, (len(full), self._config.seq_len // 2)
        x = np.array(window.x)
        x[full, :kept] = x[full, T - kept :]
        whole, rest = divmod(kept, self._config.patch_size)
        k = np.where(full, whole, window.k).astype(np.int32)
        given = np.where(full, rest, window.given).astype(np.int32)
        read = self._read(x, np.where(full, whole, 0).astype(np.int32))

        def merged(new: jax.Array, old: jax.Array) -> jax.Array:
            heads = old.shape[0] // B
            return jnp.where(np.repeat(full, heads)[:, None, None], new, old)

        cache = read if full.all() else jax.tree.map(merged, read, cache)
        return _Window(x, k, given, window.made), cache

    def _read(self, x: NDArray[np.uint8], k: NDArray[np.int32]) -> Any:
        """The cache after the first k patches of each window."""
        if not k.any():
            return functional.empty_cache(self._config, len(x))
        P = self._config.patch_size
        # A power of two, so that few programs serve prompts of all lengths.
        size = min(1 << (int(k.max()) - 1).bit_length(), x.shape[1] // P) * P
        return _prefill(self._config, self._params, x[:, :size], k)


class _Output:
    """What has been made after a prompt, up to its end."""

    def __init__(self, num_bytes: int, stop: bytes | None) -> None:
        self.num_bytes, self.stop = num_bytes, stop
        self.data = bytearray()
        self.complete = num_bytes == 0

    def take(self, made: NDArray[np.uint8], log_probs: NDArray[np.float32]) -> Generated:
        """Adds bytes, as far as they belong to the output; returns those."""
        before = len(self.data)
        if not self.complete:
            self.data += made.tobytes()[: self.num_bytes - before]
            self.complete = len(self.data) == self.num_bytes
        if self.stop is not None:
            found = self.data.find(self.stop, max(0, before + 1 - len(self.stop)))
            if found >= 0:
                del self.data[found + len(self.stop) :]
                self.complete = True
        new = bytes(self.data[before:])
        return Generated(new, log_probs[: len(new)])


def generate(
    config: ModelConfig,
    params: functional.Params,
    prompts: Sequence[bytes],
    num_bytes: int,
    sampling: Sampling = Sampling(),
    stop: bytes | None = None,
) -> list[Generated]:
    """Continues prompts with a model once; a `Decoder` does it again and again.

    Args:
        config: the model.
        params: its parameters.
        prompts: see `Decoder.generate`, as the rest.
        num_bytes: how many to make after each.
        sampling: how bytes are chosen.
        stop: bytes that end an output.

    Returns:
        What was made after each prompt.

    Raises:
        UserError: num_bytes or stop is out of range.
    """
    return Decoder(config, params).generate(prompts, num_bytes, sampling, stop)
