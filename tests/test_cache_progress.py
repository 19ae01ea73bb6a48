"""What is shown while long work goes on: on a terminal, and in a log file."""

from __future__ import annotations

import io

import pytest

from teacher_cache.terminal import progress
from teacher_cache.terminal.progress import LINE_EVERY_S, Progress, clock


class Clock:
    """time.monotonic for a test: it stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(progress.time, "monotonic", moved)
    return moved


def test_a_log_file_gets_few_lines(time, capsys):
    """Without a terminal: a line at the start, one every LINE_EVERY_S seconds at most, however fast the work, one at the end."""
    with progress.progress("view 0: demo", 100_000, "crops", 20_000) as advance:
        for _ in range(800):
            time.now += 1
            advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "view 0: demo: 100,000 crops, 20,000 of them done before"
    assert lines[1] == "view 0: demo: 38,000 of 100,000 crops, 100 crops/s, 0:10:20 left"
    assert lines[-1] == "view 0: demo: 80,000 crops in 0:13:20, 100 crops/s"
    assert len(lines) == 2 + 800 // LINE_EVERY_S


def test_short_work_and_none(time, capsys):
    """Work of a second is two lines; work that was done already is none."""
    with progress.progress("verify", 2_000_000, "B") as advance:
        time.now += 1
        advance(2_000_000)
    assert capsys.readouterr().err == "verify: 2 MB\nverify: 2 MB in 0:00:01, 2 MB/s\n"
    with progress.progress("verify", 5, "files", 5) as advance:
        pass
    assert capsys.readouterr().err == ""


def test_an_error_is_no_end(time, capsys):
    """Work that fails is not reported as finished."""
    with pytest.raises(OSError), progress.progress("verify", 5, "files"):
        raise OSError
    assert capsys.readouterr().err == "verify: 5 files\n"


def test_what_is_waited_for(time):
    """Shares of the time by what was waited for, the largest first; less than a hundredth is not mentioned."""
    advance = Progress("view 0", 30, "crops")

    def batches():
        for batch in range(3):
            time.now += 1.0
            yield batch

    for _ in advance.each(batches(), "decode"):
        with advance.waits_for("teacher"):
            time.now += 8.0
        with advance.waits_for("claims"):
            time.now += 0.05
        with pytest.raises(OSError), advance.waits_for("disk"):  # time that ends in an error counts, too
            time.now += 0.5
            raise OSError
        time.now += 0.45
        advance(10)
    assert advance.state() == "30 of 30 crops, 1 crops/s, waits for teacher 80%, decode 10%, disk 5%"


def test_slow_and_unbegun(time):
    """A rate below ten has two figures; before the first unit there is no time left to tell."""
    advance = Progress("view 0", 100, "crops")
    time.now += 8
    assert advance.left() == "?"
    advance(2)
    assert advance.state() == "2 of 100 crops, 0.25 crops/s" and advance.left() == "0:06:32"
    assert clock(3723) == "1:02:03"


def test_a_terminal_gets_a_bar(time, monkeypatch):
    """On a terminal there is a bar with rate, waits and the time left, and no lines."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("view 0: demo", 100, "crops") as advance:
        with advance.waits_for("teacher"):
            time.now += 10
        advance(50)
        time.now += 1  # the bar draws itself at the end
    assert "50 of 100 crops, 5 crops/s, waits for teacher 100%" in terminal.getvalue()
    assert "0:00:10 left" in terminal.getvalue() and "in 0:00" not in terminal.getvalue()
