"""The batch files of scripts/slurm, run by bash with programs in the place of Slurm's and of teacher-cache."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "scripts/slurm"
FAKES = {
    "srun": 'echo "srun $1" >> calls; shift; exec "$@"',
    "teacher-cache": 'echo "$@" >> calls; exit $CODE',
    "squeue": 'echo "$STATE"',
    "scontrol": 'echo "scontrol $@" >> calls',
}


def submit(folder: Path, name: str, code: int, state: str = "RUNNING", **environment: str) -> tuple[int, list[str], str]:
    """Exit code of a batch file whose task ends with `code`, what it called, and what it said."""
    for program, line in FAKES.items():
        (folder / program).write_text(f"#!/bin/bash\n{line}\n")
        (folder / program).chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "CODE": str(code), "STATE": state, "SLURM_JOB_ID": "99"}
    command = ["bash", str(FOLDER / name), "my cache", "--teacher", "clip-b16"]
    done = subprocess.run(command, cwd=folder, env=given | environment, capture_output=True, text=True)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done.returncode, calls, done.stderr


@pytest.mark.parametrize("name", ["join.sbatch", "array.sbatch"])
def test_they_are_bash(name):
    """Both parse, ask for SIGTERM before their time is over, and for a log that a requeued task goes on with."""
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    lines = (FOLDER / name).read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@90", "--requeue", "--open-mode=append"} <= set(options)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]  # Slurm reads none behind it


@pytest.mark.parametrize(
    ("code", "state", "is_requeued"),
    [(0, "RUNNING", False), (1, "RUNNING", False), (75, "RUNNING", True), (75, "COMPLETING", False)],
)
def test_what_is_requeued(tmp_path, code, state, is_requeued):
    """A task that was stopped by SIGTERM goes back into the queue, unless Slurm has ended it already; no other one does."""
    ended, calls, _ = submit(tmp_path, "join.sbatch", code, state)
    assert ended == code
    assert calls[:2] == ["srun --kill-on-bad-exit=0", "extract --join my cache --teacher clip-b16"]
    assert calls[2:] == ["scontrol requeue 99"] * is_requeued


def test_ranges(tmp_path):
    """A task of an array makes its own range; without SHARDS it says what to give, and starts nothing."""
    ended, calls, _ = submit(tmp_path, "array.sbatch", 0, SHARDS="40", SLURM_ARRAY_TASK_ID="3")
    assert (ended, calls[1]) == (0, "extract --shards 120:160 my cache --teacher clip-b16")
    (tmp_path / "calls").unlink()
    ended, calls, said = submit(tmp_path, "array.sbatch", 0, SLURM_ARRAY_TASK_ID="3")
    assert ended != 0 and calls == [] and "how many shards a task makes, such as SHARDS=40" in said
