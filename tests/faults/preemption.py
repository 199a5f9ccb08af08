"""SIGTERM and the like: the last update is saved, the status 143, and the run goes on from it."""

import random
import re
import signal
import time
from pathlib import Path

from configs import quickstart
from tests.faults import driver
from tests.faults.driver import Outcome, Trainer
from tests.faults.kills import chain

MOST_SECONDS = 10


class Stop:
    """Strikes that stop a life with a signal, and how long the slowest took.

    Attributes:
        worst: seconds from the signal to the end of the process.
        where: what the process said last before it.
    """

    def __init__(self) -> None:
        self.worst, self.where = 0.0, ""

    def send(self, life: Trainer, number: int) -> bool:
        """Sends a signal and checks what becomes of the life; False if that ended before."""
        begun = time.monotonic()
        return life.send(number) and self.check(life, begun)

    def check(self, life: Trainer, begun: float = 0) -> bool:
        """Checks the end of a life that has, or sends itself, a signal."""
        status = life.end()
        if status == 0:
            return False
        stopping = [i for i, (_, line) in enumerate(life.lines) if line.endswith("stopping ...")]
        assert status == 143 and stopping, f"status {status}: {life.said[-1000:]}"
        seconds = time.monotonic() - (begun or life.lines[stopping[0]][0])
        where = life.lines[stopping[0] - 1][1].split("/")[0] if stopping[0] else "at the start"
        if seconds > self.worst:
            self.worst, self.where = seconds, where
        self._require_saved(life)
        assert seconds < MOST_SECONDS, f"{seconds:.1f} s, {where}"
        return True

    def _require_saved(self, life: Trainer) -> None:
        """What it says is saved is there, and no update that was reported is lost."""
        reported = max(map(int, re.findall(r"^step (\d+)/", life.said, re.M)), default=0)
        saved = re.search(r"preempted by SIG\w+: update (\d+) is saved", life.said)
        kept = max(driver.checkpoints(life.workdir), default=0)
        if saved:
            assert int(saved[1]) == kept >= reported, life.said[-1000:]
        else:
            assert re.search(r"preempted by SIG\w+: (there is )?nothing", life.said), life.said
            assert reported <= kept, life.said[-1000:]


def at_random_times(scratch: Path, tries: int, seed: int) -> Outcome:
    """Runs of the size of the quickstart, stopped at any moment from their first line on."""
    moments, stop = random.Random(seed), Stop()
    config = quickstart.get_config()
    config.train.update(num_bytes=0, num_steps=6 + 3 * tries)
    config.optimizer.warmup_steps = 3
    config.log_interval = 1
    config.eval.num_bytes = 10_000
    config.sample.num_bytes = 0
    config.checkpoint.interval = 5

    def strike(life: Trainer) -> bool:
        life.wait_for(".")
        time.sleep(moments.uniform(0, 9))
        return stop.send(life, signal.SIGTERM)

    lost = chain(scratch, config, [("", strike)] * tries).lost
    return Outcome(lost, stop.worst, stop.where)


def in_each_phase(scratch: Path, tries: int, seed: int) -> Outcome:
    """While it compiles, waits for data, saves, evaluates and restores; in this order."""
    moments, stop = random.Random(seed), Stop()
    faults = [
        "compile:1:SIGTERM",
        "data:{}:SIGTERM data:{}:sleep=2",
        "save:{}:SIGTERM",
        "evaluation:1:SIGTERM",
        "restore:1:SIGTERM",
    ]
    strikes = [
        (faults[i % len(faults)].replace("{}", str(moments.randint(1, 5))), stop.check)
        for i in range(tries)
    ]
    return Outcome(chain(scratch, driver.tiny(), strikes[::-1]).lost, stop.worst, stop.where)


def otherwise(scratch: Path, tries: int, seed: int) -> Outcome:
    """SIGTERM twice, SIGINT, SIGUSR1, and SIGTERM with SIGKILL shortly after; in turns."""
    moments, stop = random.Random(seed), Stop()

    def strike(life: Trainer, kind: int) -> bool:
        life.wait_for("^step ")
        time.sleep(moments.uniform(0, 2))
        begun = time.monotonic()
        hit = life.send((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)[kind])
        if kind == 0:
            time.sleep(moments.uniform(0, 0.2))
            life.send(signal.SIGTERM)
        if kind == 3:
            time.sleep(moments.uniform(0, 0.5))
            return (life.kill() or life.process.returncode == 143) and hit
        return hit and stop.check(life, begun)

    strikes = [("", lambda life, kind=i % 4: strike(life, kind)) for i in range(tries)]
    return Outcome(chain(scratch, driver.tiny(), strikes).lost, stop.worst, stop.where)
