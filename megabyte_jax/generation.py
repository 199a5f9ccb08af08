"""Bytes after prompts: sampled from a model patch by patch, with the keys and values kept.

A prompt is read by the parallel forward pass up to its last whole patch; the bytes left over are
run through the decoder again as given ones, so that any mixture of lengths decodes in step, the
global model once per patch and the local one once per byte. A window holds seq_len bytes: when it
is full its older half is dropped and what is left, the last seq_len // 2 bytes, is read again. The
first time that compiles a program of its own; after that nothing is compiled any more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from megabyte_jax.errors import NonFiniteError, UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import ModelConfig
from megabyte_jax.sampling import MODEL_DISTRIBUTION, Sampling, Settings, choose, gumbel_noise

_BYTES_PER_CALL = 128  # made before the host looks for a stop string


def check_length(num_bytes: int, stop: bytes | None) -> None:
    """Checks how long an output is to be.

    Raises:
        UserError: num_bytes is no whole number of at least 0, or stop is no bytes, empty or longer
            than that.
    """
    if not isinstance(num_bytes, (int, np.integer)) or num_bytes < 0:
        raise UserError(f"--num_bytes={num_bytes}: accepted is a whole number of at least 0")
    if stop is not None and not (isinstance(stop, bytes) and 1 <= len(stop) <= num_bytes):
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
    settings: Settings,
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
        noise = gumbel_noise(keys, window.made - window.given + i * P, P)
        h, cache = functional.begin_patch(config, unstacked, cache, x, k)
        places = k[:, None] * P + jnp.arange(P)[None]

        def byte(p: jax.Array, carry: Any) -> Any:
            cache, bytes_, scores = carry
            before = bytes_[:, jnp.maximum(p - 1, 0)]
            logits, cache = functional.next_byte(config, unstacked, cache, h, k, p, before)
            chosen = jnp.where(p < given, bytes_[:, p], choose(logits, noise[:, p], settings))
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
        sampling: Sampling = MODEL_DISTRIBUTION,
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
            UserError: a prompt, num_bytes or stop is not what it must be.
            NonFiniteError: a prediction of the model is no number.
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
        sampling: Sampling = MODEL_DISTRIBUTION,
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
            UserError: a prompt, num_bytes or stop is not what it must be.
            NonFiniteError: a prediction of the model is no number.
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
        if not all(isinstance(prompt, bytes) for prompt in prompts):
            raise UserError("prompt: accepted is bytes, of several prompts a list of them")
        outputs = [_Output(num_bytes, stop) for _ in prompts]
        seeds = np.arange(sampling.seed, sampling.seed + len(prompts)) % 2**32
        keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
        return self._calls(prompts, outputs, sampling.settings, keys, patches_per_call)

    def _calls(
        self,
        prompts: Sequence[bytes],
        outputs: list[_Output],
        settings: Settings,
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
            parts = [
                output.take(made[i, given : n * P], log_probs[i, given : n * P])
                for i, (output, given) in enumerate(zip(outputs, window.given, strict=True))
            ]
            if not all(np.isfinite(part.log_probs).all() for part in parts):
                raise NonFiniteError("the model's predictions are not finite")
            yield parts
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
            return functional.init_cache(self._config, len(x))
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
    sampling: Sampling = MODEL_DISTRIBUTION,
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
        UserError: a prompt, num_bytes or stop is not what it must be.
        NonFiniteError: a prediction of the model is no number.
    """
    return Decoder(config, params).generate(prompts, num_bytes, sampling, stop)
