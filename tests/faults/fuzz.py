"""Thousands of configs, of which each is refused in a line that names the key, or can be trained.

    python -m tests.faults.fuzz --cases=10000 --seed=0

Every case goes through the flags, the config file and `--validate_only` of train.py itself. Of the
accepted ones the initial state and an update are traced, and of some with small models a first
update is made, which must be finite. All in one child process, which another one replaces where a
case kills it or takes too long.
"""

import tests.conftest  # noqa: F401, I001  # how JAX runs, before anything imports it

import argparse
import contextlib
import io
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.driver import Outcome

CASE_SECONDS = 60
MEMORY = 24 << 30  # of address space, so that no case takes the machine with it


def main() -> int:
    """Prints the line of the table; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=60, help="first updates made")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run(Path(scratch), arguments.cases, arguments.seed, arguments.updates)
    counts = Counter(kind for kind, _ in outcomes)
    for number, (kind, why) in enumerate(outcomes):
        if kind == "bad":
            print(f"case {number}: {why}")
    print(f"{dict(counts)} in {time.monotonic() - start:.0f} s")
    lost = counts["bad"]
    print("fault, tries, survived, lost")
    print(f"fuzzed config, {arguments.cases}, {arguments.cases - lost}, {lost}")
    return 1 if lost else 0


def run(scratch: Path, cases: int, seed: int, updates: int) -> list[tuple[str, str]]:
    """Tries the cases.

    Args:
        scratch: an empty directory.
        cases: how many.
        seed: of the cases.
        updates: how many of the accepted ones are trained for a first update.

    Returns:
        Of each case accepted, updated, refused or bad, and what was bad.
    """
    context = multiprocessing.get_context("spawn")
    outcomes: list[tuple[str, str]] = []
    while len(outcomes) < cases:
        ours, theirs = context.Pipe()
        left = updates - sum(kind == "updated" for kind, _ in outcomes)
        child = context.Process(
            target=_child, args=(theirs, scratch, seed, len(outcomes), cases, left)
        )
        child.start()
        theirs.close()
        with ours, contextlib.suppress(EOFError):
            while len(outcomes) < cases and ours.poll(CASE_SECONDS):
                outcomes.append(ours.recv())
        if len(outcomes) < cases:
            child.kill()
            child.join()
            outcomes.append(("bad", f"no answer in {CASE_SECONDS} s, or dead: {child.exitcode}"))
        child.join()
    return outcomes


def lane(scratch: Path, tries: int, seed: int) -> Outcome:
    """Random cases, of which a few make an update."""
    return Outcome([why for kind, why in run(scratch, tries, seed, 25) if kind == "bad"])


def _child(pipe: Any, scratch: Path, seed: int, first: int, stop: int, updates: int) -> None:
    from tests.faults import fuzz_cases

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    traced: set[str] = set()
    for number in range(first, stop):
        outcome = attempt(fuzz_cases.case(seed, number), scratch, traced, updates > 0)
        updates -= outcome[0] == "updated"
        pipe.send(outcome)


def attempt(case: Any, scratch: Path, traced: set[str] | None, update: bool) -> tuple[str, str]:
    """Runs train.py on a case.

    Args:
        case: the case.
        scratch: directory for its config file and its work directory.
        traced: what was traced before, which is added to; None if nothing is to be.
        update: whether a first update is made, if the model is small.

    Returns:
        Its kind, as `run` gives it, and what was bad.
    """
    from absl import flags

    from megabyte_jax import cli
    from tests import runs

    file, workdir = scratch / "case.py", scratch / "run"
    file.write_text(
        case.source, errors="surrogateescape" if "\ud800" not in case.source else "replace"
    )
    before = sorted(scratch.iterdir())
    kinds = ["accepted"]

    def accepted() -> None:
        entry["main"]()
        if traced is not None and _trace(flags.FLAGS.config, traced, update):
            kinds.append("updated")

    entry, argv = runs.entry_point("train"), sys.argv
    arguments = [a.replace("FILE", str(file)) for a in case.arguments]
    sys.argv = ["train.py", f"--workdir={workdir}", "--validate_only", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _quiet():
            cli.run(accepted)
    except SystemExit as exit:
        status = exit.code or 0
    except BaseException:
        return "bad", f"{arguments} {case.names}: {traceback.format_exc()[-1500:]}"
    finally:
        sys.argv = argv
    why = _wrong(case, status, out.getvalue(), err.getvalue())
    if sorted(scratch.iterdir()) != before:
        why = "left something on the disk"
    if why:
        return "bad", f"{[a[:200] for a in arguments]} {case.names} {case.source[-300:]!r}: {why}"
    return (kinds[-1] if status == 0 else "refused"), ""


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _wrong(case: Any, status: object, out: str, err: str) -> str:
    """What is wrong with how train.py ended; nothing if all is as it should be."""
    if status == 0:
        return "" if out.startswith("parameters ") and not err else f"odd output: {out!r} {err!r}"
    said = f"status {status}: {out[:300]}{err[:900]}"
    if status != 2 or out or err.count("\n") != 1 or "Traceback" in err:
        return said
    parts = {part for name in case.names for part in (name, *name.split(".")) if part}
    # One that stands by itself behind a flag that takes none.
    alone = [a for a in case.arguments if "=" not in a or not a.startswith("--")]
    parts |= {repr(a.lstrip("-"))[:40] for a in alone if parts}
    named = not parts or any(part in err for part in parts) or "--config=" in err
    return "" if named and "accepted" in err and err.startswith("train.py: error: ") else said


def _trace(config: Any, traced: set[str], update: bool) -> bool:
    """Traces the state and an update of an accepted config; whether a real one was made too."""
    import jax
    import jax.numpy as jnp

    from megabyte_jax import flops, run_config, run_summary, training
    from megabyte_jax.optimizer import make_optimizer, make_schedule

    model, train = run_config.validate(config), config.train
    # What else there is are numbers, which a trace does not depend on.
    key = f"{model} {train.batch_size} {train.grad_accumulation} {config.optimizer.name}"
    key += config.optimizer.state_dtype
    small = flops.num_parameters(model) < 10**5 and train.batch_size * model.seq_len <= 2**12
    update = update and small
    if key in traced and not update:
        return False
    traced.add(key)
    schedule = make_schedule(config.optimizer, config.train, model.seq_len)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = training.make_train_step(
        model, optimizer, schedule, config.seed, config.train.grad_accumulation
    )
    shape = config.train.batch_size, model.seq_len
    if not update:
        params = run_summary.parameters(model)
        count = jax.ShapeDtypeStruct((), "int32")
        state = training.TrainState(count, params, jax.eval_shape(optimizer.init, params))
        jax.eval_shape(step, state, jax.ShapeDtypeStruct(shape, "uint8"))
        return False
    data = jax.random.randint(jax.random.key(1), shape, 0, 256).astype("uint8")
    state, metrics = step(training.init_state(model, optimizer, config.seed), data)
    values = [metrics[name] for name in ("loss", "grad_norm", "param_norm")]
    values += jax.tree.leaves(state)
    assert all(bool(jnp.isfinite(x).all()) for x in values), "not finite"
    return True


if __name__ == "__main__":
    sys.exit(main())
