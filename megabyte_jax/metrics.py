"""What a run reports while it trains: a bar or lines, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tensorboardX import SummaryWriter
from tqdm import tqdm

from megabyte_jax.errors import NonFiniteError
from megabyte_jax.text import printable
from megabyte_jax.training import Metrics


class Reporter:
    """Writes the metrics of a run everywhere they go.

    `metrics.jsonl` has an object per line: training records have `step`, `bytes_seen`,
    `bits_per_byte`, `bytes_per_second` and more; evaluations have `eval/...` keys. Records after
    the step a run resumes from are dropped, so that no step appears twice.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        num_steps: int,
        bytes_per_step: int,
        log_interval: int,
        peak: float,
        primary: bool = True,
    ) -> None:
        """Opens the files.

        Args:
            workdir: the work directory.
            start: step the run starts or resumes at.
            num_steps: step it ends at.
            bytes_per_step: bytes an update trains on.
            log_interval: updates between records.
            peak: bytes per second at which the model's FLOPs would be all that the measured
                rate of matrix products allows.
            primary: whether this process reports; the other processes of a run only check that
                its figures are finite.
        """
        self._primary = primary
        self._workdir, self._num_steps, self._peak = workdir, num_steps, peak
        self._bytes_per_step, self._log_interval = bytes_per_step, log_interval
        self._file = _reopen(workdir / "metrics.jsonl", start) if primary else None
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start + 1, write_to_disk=primary
        )
        self._bar = tqdm(
            total=num_steps * bytes_per_step,
            initial=start * bytes_per_step,
            unit="B",
            unit_scale=True,
            disable=not (primary and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._since, self._paused, self._steps = time.perf_counter(), 0.0, 0
        self._begun: set[str] = set()

    def __enter__(self) -> Reporter:
        """Returns itself; leaving the block closes the files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self._bar.close()
        self._events.close()
        if self._file:
            self._file.close()

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the bar if there is one."""
        if self._primary:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    @contextlib.contextmanager
    def paused(self, what: str, *, compiles: bool = False) -> Iterator[None]:
        """Says what is done inside, and leaves its time out of the training speed.

        Args:
            what: is done.
            compiles: whether it compiles the first time.
        """
        first, self._begun = what not in self._begun, self._begun | {what}
        self.say(f"{'compiling and ' if compiles and first else ''}{what} ...")
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def update(self, step: int, metrics: Metrics) -> None:
        """Counts an update, once it is finished, and reports it if it is its turn.

        Args:
            step: its number, from 1.
            metrics: as `make_train_step` gives them.

        Raises:
            NonFiniteError: its loss is not finite, or the norm of its gradients or of the
                parameters it made.
        """
        loss, grad_norm, param_norm, learning_rate = (
            float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "learning_rate")
        )
        if not all(map(math.isfinite, (loss, grad_norm, param_norm))):
            raise NonFiniteError(
                f"update {step}: the loss is {loss}, the norm of the gradients {grad_norm} and of "
                f"the parameters {param_norm}; the saved checkpoints are from before; accepted is "
                f"a finite loss, as a lower optimizer.learning_rate than {learning_rate:g} may give"
            )
        self._steps += 1
        self._bar.update(self._bytes_per_step)
        if step % self._log_interval and step != self._num_steps:
            return
        seen, speed = step * self._bytes_per_step, self._speed()
        bits, utilisation = loss / math.log(2), speed / self._peak
        self.write(
            step,
            {
                "bytes_seen": seen,
                "bits_per_byte": bits,
                "bytes_per_second": speed,
                "utilisation": utilisation,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "param_norm": param_norm,
            },
        )
        shown = f"{bits:.3f} bits/byte, utilisation {utilisation:.0%}"
        self._bar.set_postfix_str(shown)
        if self._bar.disable:
            left = (self._num_steps - step) * self._bytes_per_step / speed
            self.say(
                f"step {step}/{self._num_steps}  {seen / 1e6:.2f} MB seen  {shown}  "
                f"{speed / 1e3:.1f} kB/s  {left:.0f} s left"
            )

    def _speed(self) -> float:
        """Bytes per second since the last call, without the pauses."""
        now = time.perf_counter()
        speed = self._steps * self._bytes_per_step / (now - self._since - self._paused)
        self._since, self._paused, self._steps = now, 0.0, 0
        return speed

    def evaluation(self, step: int, bits_per_byte: float, size: int) -> None:
        """Reports an evaluation.

        Args:
            step: updates made.
            bits_per_byte: on the validation split.
            size: bytes it was measured on.
        """
        self.write(step, {"eval/bits_per_byte": bits_per_byte, "eval/bytes": size})
        self.say(f"step {step}: {bits_per_byte:.4f} bits/byte on {size:,} bytes of validation")

    def sample(self, step: int, contents: bytes, suffix: str = ".txt") -> None:
        """Keeps a sample in `samples/` and shows it, if it is text.

        Args:
            step: updates made.
            contents: of its file.
            suffix: of its name.
        """
        if not self._primary:
            return
        path = self._workdir / "samples" / f"{step:08d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents)
        shown = f":\n{printable(contents)}\n" if suffix == ".txt" else f" in {path}"
        self.say(f"step {step}, a sample{shown}")

    def write(self, step: int, record: dict[str, float]) -> None:
        """Writes a record to metrics.jsonl and TensorBoard.

        Args:
            step: it belongs to.
            record: name to value.
        """
        if not self._file:
            return
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._events.add_scalar(name if "/" in name else f"train/{name}", value, step)


def _reopen(path: Path, start: int) -> TextIO:
    """Opens a log for appending, without the records after step `start`."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, path)
    return path.open("a")


def _step(line: str) -> float:
    """Step of a record; one that a crash cut short counts as after every step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
