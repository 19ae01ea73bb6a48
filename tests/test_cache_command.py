"""How commands end: by an error, by Ctrl-C, by SIGTERM, at any moment of their lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from teacher_cache.errors import BadInputError, MismatchError
from teacher_cache.terminal.command import one_line_errors
from teacher_cache.terminal.signals import Stopped, signals_raise

NUMBERS = {130: signal.SIGINT, 75: signal.SIGTERM}


def ending(error: BaseException) -> tuple[int, str]:
    """Exit code and output of a command in which `error` is raised."""

    @click.command()
    def command():
        with one_line_errors(lambda: "Two are kept.", (KeyError,), (LookupError,)):
            raise error

    result = CliRunner().invoke(command, [])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "error, code, output",
    [
        (BadInputError("No."), 1, "Error: No.\n"),
        (MismatchError("No."), 2, "Error: No.\n"),
        (KeyError("No."), 2, "Error: 'No.'\n"),
        (IndexError("No."), 1, "Error: No.\n"),
        (OSError(28, "No space left on device", "file"), 1, "Error: file: No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted. Two are kept.\n"),
        (Stopped(), 75, "\nStopped by SIGTERM. Two are kept.\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_endings(error, code, output):
    """Every error and signal has its exit code and one sentence."""
    assert ending(error) == (code, output)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_signals_raise(number, error):
    """Inside the block a signal is an exception; outside, whatever it was before."""
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, signals_raise():
        os.kill(os.getpid(), number)
    assert type(caught.value) is error and signal.getsignal(number) is before


def test_ignored_signals_stay_ignored():
    """A program that a shell has put into the background is not stopped by the Ctrl-C of the foreground."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


PROGRAM = """
import atexit, os, signal, sys, time
from teacher_cache.terminal.signals import run_program

def send(): os.kill(os.getpid(), int(sys.argv[1]))

class Swallows:
    def __del__(self): send()  # an exception here would be printed and lost

def load():
    if sys.argv[2] == "imports": Swallows()
    return command

def command():
    if sys.argv[2] == "before": send()
    from teacher_cache.terminal.command import one_line_errors
    try:
        with one_line_errors("Two are kept."):
            if sys.argv[2] == "work": send()
            if sys.argv[2] == "dropped":
                Swallows()
                time.sleep(60)
            sys.exit(3)
    finally:
        if sys.argv[2] == "end": send()
        if sys.argv[2] == "exit": atexit.register(send)

run_program(load)
"""


@pytest.mark.parametrize("code", NUMBERS)
@pytest.mark.parametrize("moment", ["imports", "before", "work", "dropped", "end", "exit"])
def test_signals_at_every_moment(code, moment):
    """From its first import to its last line a program that gets a signal ends with the signal's exit code and no traceback; when
    it has ended by itself, a late signal changes nothing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(int(NUMBERS[code])), moment], capture_output=True, text=True)
    how = {130: "Interrupted", 75: "Stopped by SIGTERM"}[code]
    assert done.returncode == (3 if moment == "exit" else code)
    assert done.stderr == (f"\n{how}. Two are kept.\n" if moment in ("work", "dropped") else "")


@pytest.mark.parametrize(
    "words, shown",
    [
        (["-m", "teacher_cache", "--version"], "teacher_cache, version"),
        (["-m", "student", "--help"], "student-train"),
        (["-c", "from student.__main__ import evaluate; evaluate()", "knn", "--help"], "student-eval knn"),
    ],
    ids=["teacher_cache", "student", "student-eval"],
)
def test_programs_start(words, shown):
    """The rooms run as modules, by the functions that the console scripts call."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and shown in done.stdout, done.stderr
