"""The commands as functions, for children in which everything is loaded already (preload.py)."""

from __future__ import annotations

from typing import NoReturn

import student.cli.evaluate
import student.cli.train
import teacher_cache.cli.main

PROGRAMS = {
    "teacher-cache": teacher_cache.cli.main.main,
    "student-train": student.cli.train.train,
    "student-eval": student.cli.evaluate.evaluate,
}


def run_program(program: str, *arguments) -> NoReturn:
    """Be the command, to its exit code."""
    PROGRAMS[program](args=[str(argument) for argument in arguments], prog_name=program)
    raise AssertionError("a command that returns")
