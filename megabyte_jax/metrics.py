"""What a run reports while it trains: a bar or lines, metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from megabyte_jax import files
from megabyte_jax.errors import StorageError
from megabyte_jax.text import printable
from megabyte_jax.training import Metrics


class Reporter:
    """Writes the metrics of a run everywhere they go.

    `metrics.jsonl` has an object per line: training records have `step`, `bytes_seen`,
    `bits_per_byte`, `bytes_per_second` and more; evaluations have `eval/...` keys. Records after
    the step a run resumes from are dropped, so that no step appears twice. What cannot be written
    is said and waits, as `files.Log` has it: a run does not end for its logs.
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

        Raises:
            StorageError: the logs cannot be opened; those of before are as they were.
        """
        self._primary = primary
        self._workdir, self._num_steps, self._peak = workdir, num_steps, peak
        self._bytes_per_step, self._log_interval = bytes_per_step, log_interval
        self._logs = self._open_logs(start) if primary else None
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

    def _open_logs(self, start: int) -> tuple[files.Log, files.Log]:
        """Opens metrics.jsonl and a new file of events, for what comes after step `start`."""
        path, folder = self._workdir / "metrics.jsonl", self._workdir / "tensorboard"
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        try:
            _drop_after(path, start)
            folder.mkdir(exist_ok=True)
            records = files.Log(path, path.name, self.say)
            events = files.Log(folder / name, folder.name, self.say)
        except OSError as error:
            raise StorageError(
                f"--workdir={self._workdir}: {error.strerror} ({error.filename or path}); accepted "
                "is a directory that can be written, with space for the logs"
            ) from None
        events.append(_framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
        # Of earlier files TensorBoard then hides what they have from that step on.
        begin = SessionLog(status=SessionLog.START)
        events.append(_framed(Event(wall_time=time.time(), step=start + 1, session_log=begin)))
        return records, events

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
        for log in self._logs or ():
            log.close()

    def say(self, text: str) -> None:
        """Prints a line on stderr, as `files.say` does, if this process reports."""
        if self._primary:
            files.say(text)

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
        """
        loss, grad_norm, param_norm, learning_rate = (
            float(metrics[name]) for name in ("loss", "grad_norm", "param_norm", "learning_rate")
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
        path = self._sample_path(step, suffix)
        shown = f":\n{printable(contents)}\n" if suffix == ".txt" else f" in {path}"
        try:
            path.parent.mkdir(exist_ok=True)
            files.replace(path, contents)
        except OSError as error:
            self.say(f"samples/{path.name} cannot be written: {error.strerror}")
            shown = shown if suffix == ".txt" else " that is lost"
        self.say(f"step {step}, a sample{shown}")

    def lacks(self, step: int, suffix: str) -> tuple[bool, bool]:
        """Whether the evaluation and the sample of a step are missing, where it was stopped.

        Args:
            step: updates made.
            suffix: of the name of the sample.
        """
        if not self._primary:
            return False, False
        path = self._workdir / "metrics.jsonl"
        evaluated = any(
            b"eval/bytes" in line and _step(line) == step for line in path.read_bytes().split(b"\n")
        )
        return not evaluated, not self._sample_path(step, suffix).exists()

    def _sample_path(self, step: int, suffix: str) -> Path:
        return self._workdir / "samples" / f"{step:08d}{suffix}"

    def write(self, step: int, record: dict[str, float]) -> None:
        """Writes a record to metrics.jsonl and TensorBoard.

        Args:
            step: it belongs to.
            record: name to value.
        """
        if not self._logs:
            return
        records, events = self._logs
        records.append((json.dumps({"step": step, **record}) + "\n").encode())
        values = [
            Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in record.items()
        ]
        summary = Summary(value=values)
        events.append(_framed(Event(wall_time=time.time(), step=step, summary=summary)))


def _drop_after(path: Path, start: int) -> None:
    """Takes from a log the records after step `start`, and what a crash cut short."""
    old = path.read_bytes() if path.exists() else b""
    lines = old.split(b"\n")
    kept = b"".join(line + b"\n" for line in lines if _step(line) <= start)
    if kept != old:  # on a full disk a log that is as it should be can be opened
        files.replace(path, kept)


def _step(line: bytes) -> float:
    """Step of a record; what is none, as a crash may leave it, counts as after every step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf


def _framed(event: Event) -> bytes:
    """An event as a TFRecord: length, checksum, contents, checksum."""
    contents = event.SerializeToString()
    length = struct.pack("<Q", len(contents))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, contents))
    return length + next(sums) + contents + next(sums)
