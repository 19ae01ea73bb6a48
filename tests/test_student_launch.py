"""How the processes of a run were started: told from the environment, and never half believed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from student.devices import distributed
from student.devices.launch import Launch, launch_of
from student.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment, launch",
    [
        ({}, Launch(1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "5"}, Launch(1, 0)),
        ({"WORLD_SIZE": ""}, Launch(1, 0)),
        (TORCHRUN, Launch(4, 1)),
        ({**TORCHRUN, "LOCAL_RANK": ""}, Launch(4, 0)),
    ],
)
def test_whole_environments(environment, launch):
    """One process alone, or several that know where they meet."""
    assert launch_of(environment) == launch


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "8"}, "RANK, MASTER_ADDR, MASTER_PORT, by which they find each other, are not set"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT, by which"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no number from 1"),
        ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment is no number from 0"),
    ],
)
def test_half_environments_are_told(environment, words):
    """A WORLD_SIZE that something else has left, or one that is no number, is a sentence that says what to do."""
    with pytest.raises(ConfigError, match=words):
        launch_of(environment)


def test_nobody_is_waited_for(shared_cache, tmp_path):
    """Training under a WORLD_SIZE without the rest ends at once with code 2 and one sentence."""
    command = [
        sys.executable,
        "-m",
        "student",
        "--cache",
        shared_cache.path,
        "--preset",
        "mae-demo",
        "--tiny",
        "--out",
        tmp_path / "run",
    ]
    environment = {**os.environ, "WORLD_SIZE": "2"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert run.returncode == 2 and "To train in several, start with torchrun" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


def test_the_first_error_is_said_before_the_group_is_left(monkeypatch, capsys):
    """What went wrong is printed before the processes part, which may hang or fail itself, and is what the command ends with."""
    said_before = []

    def leave():
        said_before.append(capsys.readouterr().err)
        raise RuntimeError("NCCL communicator was aborted")

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", leave)
    with pytest.raises(ValueError, match="row 7 is damaged"), distributed.processes("cpu"):
        raise ValueError("row 7 is damaged")
    assert said_before == ["Process 0: ValueError: row 7 is damaged\n"]
