"""A trained model, loaded from the work directory of its run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from megabyte_jax import evaluation, generation, restoring, run_config, sharding
from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import VOCAB_SIZE, ModelConfig
from megabyte_jax.sampling import Sampling


class TrainedModel:
    """A model with its parameters.

    Attributes:
        config: the model's config.
        params: its parameters, float32.
        step: updates they were trained for.
    """

    def __init__(self, config: ModelConfig, params: functional.Params, step: int) -> None:
        """Keeps its arguments; `load` is the usual way to make one."""
        self.config, self.params, self.step = config, params, step
        self._logits = jax.jit(functional.logits, static_argnums=0)

    def logits(self, x: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Predicts every byte from the bytes before it.

        Args:
            x: uint8 [B, T], T at most config.seq_len.

        Returns:
            float32 [B, T, V], position t holds the prediction of byte t.

        Raises:
            UserError: x is of another type, rank or longer than the context.
        """
        x = np.asarray(x)
        if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] > self.config.seq_len:
            raise UserError(
                f"x={x.dtype}{list(x.shape)}: accepted is uint8 [B, T] with T of at most "
                f"{self.config.seq_len}"
            )
        T = x.shape[1]
        if not x.size:
            return np.zeros((*x.shape, VOCAB_SIZE), np.float32)
        padded = np.pad(x, ((0, 0), (0, -T % self.config.patch_size)))
        return np.asarray(self._logits(self.config, self.params, padded))[:, :T]

    def log_likelihood(
        self, data: bytes, strategy: str = "basic", stride: int | None = None
    ) -> NDArray[np.float32]:
        """Scores every byte of a document.

        Args:
            data: the document, of any length.
            strategy: basic, sliding, strided or sliding_strided; see `megabyte_jax.evaluation`.
            stride: in bytes, for the sliding ones; None is half the context.

        Returns:
            float32 [len(data)], the log-likelihood of each byte in nats.

        Raises:
            UserError: strategy or stride does not fit the model.
        """
        document = Document("data", np.frombuffer(data, np.uint8), 0, len(data))
        corpus = Corpus("data", (document,))
        result = np.zeros(len(data), np.float32)
        for batch, losses in evaluation.score(
            self.config, self.params, corpus, 8, strategy=strategy, stride=stride
        ):
            row, position = np.nonzero(batch.scored)
            result[batch.starts[row] + position] = -losses[row, position]
        return result

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the config and of every parameter's path, type, shape and bytes, in hex."""
        config = type(self.config).__name__, dataclasses.asdict(self.config)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for path, x in jax.tree.leaves_with_path(self.params):  # dicts: in the order of the names
            x = np.ascontiguousarray(x)
            digest.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}\n".encode())
            digest.update(x.data)
        return digest.hexdigest()

    @functools.cached_property
    def decoder(self) -> generation.Decoder:
        """Generates after several prompts at once; keeps a second copy of the parameters."""
        return generation.Decoder(self.config, self.params)

    def generate(
        self,
        prompt: bytes,
        num_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        *,
        min_p: float | None = None,
        stop: bytes | None = None,
    ) -> bytes:
        """Continues a prompt.

        Args:
            prompt: of any length; the empty one starts a document.
            num_bytes: how many to make.
            temperature: 0 takes the likeliest byte.
            top_k: sample among the k likeliest bytes only.
            top_p: sample among the likeliest bytes that together reach this probability.
            seed: the same seed gives the same bytes.
            min_p: sample among the bytes at least this probable relative to the likeliest.
            stop: the result ends with the first occurrence of these bytes in it.

        Returns:
            The bytes after the prompt. `decoder` gives their log-likelihoods too.

        Raises:
            UserError: a setting is out of range.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        (made,) = self.decoder.generate([prompt], num_bytes, sampling, stop)
        return made.data

    def stream(
        self,
        prompt: bytes,
        num_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        *,
        min_p: float | None = None,
        stop: bytes | None = None,
    ) -> Iterator[bytes]:
        """Continues a prompt as `generate` does, whose bytes come one by one, patch after patch.

        Args:
            prompt: see `generate`, as the rest.
            num_bytes: how many to make.
            temperature: 0 takes the likeliest byte.
            top_k: sample among the k likeliest bytes only.
            top_p: sample among the likeliest bytes that together reach this probability.
            seed: the same seed gives the same bytes.
            min_p: sample among the bytes at least this probable relative to the likeliest.
            stop: the last bytes made, if they come.

        Returns:
            Iterator over the bytes after the prompt, one at a time.

        Raises:
            UserError: a setting is out of range.
        """
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        parts = self.decoder.stream(prompt, num_bytes, sampling, stop)
        return (bytes([byte]) for part in parts for byte in part.data)


def load(workdir: str | Path, step: int | None = None, mesh: Mesh | None = None) -> TrainedModel:
    """Loads the model of a run.

    Args:
        workdir: its work directory; nothing else is needed.
        step: which checkpoint; None for the newest that can be read.
        mesh: over which its parameters are spread, whatever they were trained on; None for the
            first device.

    Raises:
        UserError: there is no such run or checkpoint.
        CheckpointError: none of its checkpoints can be read.
    """
    config = run_config.validate(run_config.load(workdir))
    like = jax.eval_shape(lambda: functional.init_params(config, jax.random.key(0)))
    if mesh:
        like = sharding.placed(like, sharding.shardings(mesh, like))
    found, params = restoring.restore_params(Path(workdir), like, step)
    return TrainedModel(config, params, found)
