"""What becomes of a run when an update is not finite, or is a spike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megabyte_jax.data.windows import TrainWindows
from megabyte_jax.errors import NonFiniteError
from megabyte_jax.training import Metrics

_SHOWN = 4  # leaves or windows named at most


class RollBack(Exception):
    """The run is to go on from before some batches, without them.

    Attributes:
        first: the first batch to be left out.
        stop: the one after the last.
    """

    def __init__(self, first: int, stop: int, reason: str) -> None:
        """Keeps its arguments, of which the reason is the message."""
        super().__init__(reason)
        self.first, self.stop = first, stop


class Guard:
    """Judges the updates of a run, in their order, as `config.guard` says.

    The step that makes an update has not applied one that is refused here.
    """

    def __init__(
        self, config: Any, names: Sequence[str], sampler: TrainWindows, rollbacks: int
    ) -> None:
        """Keeps its arguments.

        Args:
            config: `config.guard`.
            names: as `training.judged` gives them.
            sampler: of the batches, for the places of their bytes.
            rollbacks: that the run has made.
        """
        self._config, self._names, self._sampler = config, names, sampler
        self._rollbacks, self._in_a_row = rollbacks, 0

    def judge(self, step: int, metrics: Metrics) -> str | None:
        """Judges an update, once it is finished.

        Args:
            step: its number, from 1.
            metrics: as `make_train_step` gives them.

        Returns:
            None of an update that was made; of one that was left out, what to say of it.

        Raises:
            NonFiniteError: the run cannot go on.
            RollBack: it goes on from an earlier update, as the policy is.
        """
        finite = np.asarray(metrics["finite"])
        bad = [name for name, ok in zip(self._names, finite, strict=True) if not ok]
        if metrics["applied"]:
            if not math.isfinite(metrics["param_norm"]):
                bad = ["params, as the update made them,"]
            else:
                self._in_a_row = 0
                return None
        batch, config = step - 1, self._config
        reason = self._describe(step, bad, metrics)
        lower = f"a lower optimizer.learning_rate than {float(metrics['learning_rate']):g}"
        if any(name.startswith(("params", "opt_state")) for name in bad):  # no fault of the batch
            raise NonFiniteError(
                f"{reason}; the checkpoints are from before; accepted is a finite state, as "
                f"{lower} may give"
            )
        self._in_a_row += 1
        if config.policy == "skip_update" and self._in_a_row <= config.max_skips:
            return f"{reason}; it is skipped"
        if config.policy == "rollback_skip" and self._rollbacks < config.max_skips:
            window = config.rollback_window
            raise RollBack(max(batch - window, 0), batch + window + 1, reason)
        accepted = {
            "abort": f"accepted is a finite loss and no spike, as {lower} may give, or another "
            "guard.policy",
            "skip_update": f"the last {config.max_skips} were skipped, guard.max_skips",
            "rollback_skip": f"the run has gone back {config.max_skips} times, guard.max_skips",
        }[config.policy]
        raise NonFiniteError(f"{reason}; the checkpoints are from before; {accepted}")

    def _describe(self, step: int, bad: Sequence[str], metrics: Metrics) -> str:
        named = _listed(bad)
        what = f"{named} {'is' if len(bad) == 1 else 'are'} not finite" if bad else "is a spike"
        starts = _listed(self._sampler.starts(step - 1).tolist())
        return (
            f"update {step}: {what}, with a loss of {float(metrics['loss']) / math.log(2):g} bits "
            f"per byte and a norm of the gradients of {float(metrics['grad_norm']):g}; its batch "
            f"{step - 1} has the windows at bytes {starts} of {self._sampler.corpus.name}"
        )


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    return shown + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
