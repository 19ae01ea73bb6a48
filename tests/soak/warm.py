"""The commands as functions, for children in which everything is loaded already (preload.py)."""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import student.cli.evaluate
import student.cli.report
import student.cli.train
import teacher_cache.cli.main

PROGRAMS = {
    "teacher-cache": teacher_cache.cli.main.main,
    "student-train": student.cli.train.train,
    "student-eval": student.cli.evaluate.evaluate,
    "student-report": student.cli.report.report,
}


def run_program(program: str, *arguments) -> NoReturn:
    """Be the command, to its exit code."""
    PROGRAMS[program](args=[str(argument) for argument in arguments], prog_name=program)
    raise AssertionError("a command that returns")


def run_line(folder: Path, line: str) -> None:
    """Be a line of a shell that starts one of the commands, or `python -m MODULE`, in `folder`."""
    os.chdir(folder)
    program, *words = shlex.split(line)
    if program in PROGRAMS:
        run_program(program, *words)
    assert program == "python" and words[0] == "-m", line
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
