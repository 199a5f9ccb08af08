"""A trained model, loaded from the work directory of its run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from megabyte_jax import checkpoint, evaluation, generation, run_config
from megabyte_jax.data.corpus import Corpus, Document
from megabyte_jax.errors import UserError
from megabyte_jax.models import megabyte
from megabyte_jax.models.config import VOCAB_SIZE, MegabyteConfig


class TrainedModel:
    """A model with its parameters.

    Attributes:
        config: the model's config.
        params: its parameters, float32.
        step: updates they were trained for.
    """

    def __init__(self, config: MegabyteConfig, params: megabyte.Params, step: int) -> None:
        """Keeps its arguments; `load` is the usual way to make one."""
        self.config, self.params, self.step = config, params, step
        self._logits = jax.jit(megabyte.logits, static_argnums=0)

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
            strategy: `basic`, windows of config.seq_len bytes from the start of the document.
            stride: of the windows; None, as `basic` has no choice.

        Returns:
            float32 [len(data)], the log-likelihood of each byte in nats.

        Raises:
            UserError: strategy or stride is another.
        """
        if strategy != "basic" or stride is not None:
            raise UserError(
                f"strategy={strategy!r}, stride={stride}: accepted is 'basic' without a stride"
            )
        document = Document("data", np.frombuffer(data, np.uint8), 0, len(data))
        scored = evaluation.score(self.config, self.params, Corpus("data", (document,)), 8)
        parts = [-losses[i, :n] for losses, lengths, _ in scored for i, n in enumerate(lengths)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def generate(
        self,
        prompt: bytes,
        num_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> bytes:
        """Continues a prompt; see `stream`, whose bytes it returns at once."""
        return b"".join(self.stream(prompt, num_bytes, temperature, top_k, top_p, seed))

    def stream(
        self,
        prompt: bytes,
        num_bytes: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[bytes]:
        """Continues a prompt byte by byte.

        Args:
            prompt: of any length; the empty one starts a document.
            num_bytes: how many to make.
            temperature: 0 takes the likeliest byte.
            top_k: sample among the k likeliest bytes only.
            top_p: sample among the likeliest bytes that together reach this probability.
            seed: the same seed gives the same bytes.

        Returns:
            Iterator over the bytes after the prompt, one at a time.

        Raises:
            UserError: a setting is out of range.
        """
        made = generation.stream(
            self.config,
            self.params,
            prompt,
            num_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        return (bytes([byte]) for byte in made)


def load(workdir: str | Path, step: int | None = None) -> TrainedModel:
    """Loads the model of a run.

    Args:
        workdir: its work directory; nothing else is needed.
        step: which checkpoint; None for the newest that can be read.

    Raises:
        UserError: there is no such run or checkpoint.
        CheckpointError: none of its checkpoints can be read.
    """
    config = run_config.validate(run_config.load(workdir))
    like = jax.eval_shape(lambda: megabyte.init_params(config, jax.random.key(0)))
    found, params = checkpoint.restore_params(Path(workdir), like, step)
    return TrainedModel(config, params, found)
