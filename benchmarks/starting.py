"""How long commands take that do next to nothing, and what they hold in memory, against another checkout of this project:

    python -m benchmarks.starting --against ../before --cache demo-out/cache

The other checkout has an environment of its own (`bash scripts/setup.sh` there), and can read the cache.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import click

from . import measure

COMMANDS = {
    "verify": ("-m", "teacher_cache", "verify", "{cache}"),
    "train for a step": ("-m", "student", "--cache", "{cache}", "--preset", "{preset}", "--max-steps", "1", "--out", "{out}"),
    "--list": ("-m", "student", "--list"),
    "--show": ("-m", "student", "--preset", "maskalign-b16", "--show"),
}
LIBRARIES = "the libraries of a training alone"
"""What no process that trains can do without: timm through torchvision, and every optimizer of torch, import torch._dynamo."""
IMPORTS = ("-c", "import torch._dynamo, timm, numba")
GOALS = {"verify": 5.0, "train for a step": 4.0, "--list": 8.0, "--show": 8.0}
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_of(python: Path, root: Path, command: list[str]) -> int:
    """Run a command of the checkout in `root`; its peak memory in KiB. Raises ClickException if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    whole = [sys.executable, "-c", MEASURED, str(python), *command]
    code, peak = subprocess.run(whole, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.split()
    if code != "0":
        raise click.ClickException(f"{' '.join(command)} in {root} ended with exit code {code}.")
    return int(peak)


@click.command()
@click.option("--against", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The other checkout.")
@click.option("--cache", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Of the demo.")
@click.option("--preset", default="maskalign-demo", show_default=True)
@measure.options
def main(against: Path | None, cache: Path | None, preset: str, tiny: bool, rounds: int, scratch: Path | None):
    """Seconds of commands in the other checkout over those here."""
    if against is None or cache is None:
        measure.not_run("starting", "no other checkout is given (--against DIR --cache DIR)")
        return
    where, python = measure.environment(), against.absolute() / ".venv/bin/python"
    if not python.exists():
        raise click.ClickException(f"{against} has no environment of its own: bash scripts/setup.sh there.")
    sides = {"here": (Path(sys.executable), measure.ROOT), "before": (python, against.absolute())}
    peaks: dict[str, list[int]] = {}
    with measure.scratch_folder(scratch) as folder:
        numbers, runs = itertools.count(), {}
        asked = [(what, command, side) for what, command in list(COMMANDS.items())[tiny * 2 :] for side in sides]
        for what, command, side in asked + [(LIBRARIES, IMPORTS, "here")] * (not tiny):

            def run(key=f"{what}, {side}", side=side, command=command) -> int:
                filled = [word.format(cache=cache.absolute(), preset=preset, out=folder / str(next(numbers))) for word in command]
                peaks.setdefault(key, []).append(peak_of(*sides[side], filled))
                return 1

            runs[f"{what}, {side}"] = run
        found = measure.take_turns(runs, rounds)
    claims = [
        measure.claim(f"{what}: before / here, seconds", found.over(f"{what}, here", f"{what}, before"), goal)
        for what, goal in GOALS.items()
        if f"{what}, here" in runs
    ]
    claims += [
        measure.claim(f"{what}: MB in memory", [peak * 1024 / 1e6 for peak in peaks[f"{what}, here"][1:]], 100, at_most=True)
        for what in ("--list", "--show")
    ]
    if not tiny:
        at_best = found.over(f"{LIBRARIES}, here", "train for a step, before")
        claims.append(measure.claim(f"train for a step: before / {LIBRARIES}, seconds", at_best, None))
    figures = {
        name: {"unit": "s", "median": 1 / rate["median"], "lowest": 1 / rate["highest"], "highest": 1 / rate["lowest"],
               "peak_mb": round(max(peaks[name]) * 1024 / 1e6)}
        for name, rate in found.figures().items()
    }  # fmt: skip
    other = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=against, capture_output=True, text=True).stdout.strip()
    measure.report("starting", claims, figures, [f"before: {other or 'unknown'}; each command a process of its own, warm"], where)


if __name__ == "__main__":
    main()
