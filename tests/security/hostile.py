"""What hostile directories are made of, and how they are tried in a process of its own."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import runs

MARK = "imported"
CHILD = Path(__file__).with_name("child.py")


def plant(folder: Path, mark: Path) -> None:
    """Modules that leave a mark when imported, of names that something may look for."""
    code = (
        f"open({str(mark)!r}, 'w').close()\nclass Feature: pass\nget_config = Handler = Feature\n"
    )
    for name in ("planted", "config", "jax", "numpy", "orbax", "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text(code)


def copy_of(
    run: Path, target: Path, without: Sequence[str] = (), copy: Callable[..., object] = shutil.copy2
) -> Path:
    """A copy of a run that has its newest checkpoint alone: there is nothing to fall back to."""
    newest = str(runs.saved_steps(run)[-1])

    def others(folder: str, names: list[str]) -> list[str]:
        older = [name for name in names if name != newest] if folder.endswith("checkpoints") else []
        return older + [name for name in names if name in without]

    return Path(shutil.copytree(run, target, ignore=others, copy_function=copy))


def edit(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file, `a__b` that of a nested object."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *folders, last = name.split("__")
        place = content
        for folder in folders:
            place = place[folder]
        place[last] = value
    path.write_text(json.dumps(content))


VALUES = [None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, "", "planted.X", [], {}, [[]], "../x"]


def mutate(path: Path, draw: random.Random) -> None:
    """Damages a file in one of the ways in which bytes, or JSON, can be wrong."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "join", "value", "value", "value"])
    if kind == "value" and data[:1] == b"{":
        place, key = json.loads(data), None
        whole, holder = place, {}
        while place and isinstance(place, dict | list) and (key is None or draw.random() < 0.8):
            holder = place
            key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
            place = holder[key]
        holder[key] = draw.choice(VALUES)
        data = json.dumps(whole).encode()
    elif kind == "cut" or not data:
        data = data[: draw.randrange(len(data) + 1)]
    elif kind == "join":
        data = data + data[draw.randrange(len(data)) :]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.unlink()  # all copies share what is not damaged
    path.write_bytes(data)


def attempt(
    jobs: list[tuple[str, Path]], place: Path, data: Path, cwd: Path | None = None
) -> list[dict[str, Any]]:
    """Runs jobs in a child; after its end each of the rest has ended as the child has."""
    names = {"OUT": place / "out", "XDG_CACHE_HOME": place / "cache"}
    for path in names.values():
        path.mkdir(exist_ok=True)
    env = os.environ | {name: str(path) for name, path in names.items()} | {"DATA": str(data)}
    given = json.dumps([{"action": action, "path": str(path)} for action, path in jobs])
    done = subprocess.run(
        [sys.executable, str(CHILD)],
        input=given.encode(),
        capture_output=True,
        cwd=cwd or place,
        env=env,
        timeout=600,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    lost = {"ended": f"died: {done.returncode} {done.stderr[-2000:]!r}", "events": []}
    return results + [lost] * (len(jobs) - len(results))


def attempt_each(
    cases: Mapping[str, Callable[[Path], object]],
    action: Callable[[str], str],
    run: Path,
    place: Path,
    data: Path,
) -> dict[str, dict[str, Any]]:
    """Tries a copy of a run per case, each changed by it; the first job is the run itself."""
    jobs = [(action(""), copy_of(run, place / "clean"))]
    for number, (name, change) in enumerate(cases.items()):
        workdir = copy_of(run, place / f"run{number}")
        change(workdir)
        jobs.append((action(name), workdir))
    clean, *results = attempt(jobs, place, data, cwd=jobs[1][1])
    assert clean["ended"] in ("0",) or len(clean["ended"]) == 64, clean
    return dict(zip(cases, results, strict=True))


def python(code: str, cwd: Path, without: str = "") -> str:
    """What a program prints, in an environment without a variable."""
    env = {name: value for name, value in os.environ.items() if name != without}
    env["PYTHONPATH"] = str(runs.ROOT)
    return subprocess.check_output([sys.executable, "-c", code], cwd=cwd, env=env, text=True)
