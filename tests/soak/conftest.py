"""The soak: cases with a count, all of them by hand (`--full`, `make soak`) or some of them in every test run, and their table.

A case is a test with the marker `soak(what, full=..., short=...)` and the argument `seed`. Seed 137 is the same case in both
forms, and this repeats it:

    python -m pytest --full 'tests/soak/test_soak_bits.py::test_one_flipped_bit[137]'

A test says how its case fell by `fell("found by verify")`; `--soak-report FOLDER` writes soak.md and soak.json, a line for each
kind of case: count, how many held, how they fell.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import forks
import pytest

STARTED = time.time()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="soak: every case, not only some of each")
    parser.addoption("--soak-report", metavar="FOLDER", help="soak: write what was run and how it fell into this folder")


def is_full(config) -> bool:
    """Also False where this file was not loaded early enough for its options to be known: in a run of all tests."""
    return config.getoption("--full", default=False)


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether every case is run, and commands are real ones wherever that could make a difference."""
    return is_full(request.config)


def pytest_generate_tests(metafunc):
    """Give `seed` numbers from 0 to `full`, or as many evenly spread ones as the short form takes; `kind` likewise of `kinds`."""
    marker = metafunc.definition.get_closest_marker("soak")
    if marker and (argument := {"seed", "kind"} & set(metafunc.fixturenames)):
        cases = list(marker.kwargs.get("kinds") or range(marker.kwargs["full"]))
        n = len(cases) if is_full(metafunc.config) else marker.kwargs["short"]
        metafunc.parametrize(argument.pop(), [cases[i * len(cases) // n] for i in range(n)])


def pytest_collection_finish(session):
    """Loading what children need takes seconds: begin with it before the first test, in the background."""
    if any(item.get_closest_marker("soak") for item in session.items) and not session.config.option.collectonly:
        forks.start_server()


@pytest.fixture
def tmp_path(request) -> Iterator[Path]:
    """A folder of the case's own, in memory where that is possible: cases make thousands of fsyncs. Kept if the case fails."""
    memory = Path("/dev/shm")
    in_memory = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 28
    path = Path(tempfile.mkdtemp(prefix="soak-", dir=memory if in_memory else None))
    n_failed = request.session.testsfailed
    yield path
    if request.session.testsfailed == n_failed:
        shutil.rmtree(path)


@pytest.fixture
def fell(record_property):
    """fell(how): say how the case at hand fell; once or several times a case."""
    return lambda how: record_property("fell", how)


@dataclass
class Line:
    """A line of the table: one kind of case."""

    what: str
    test: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    fell: dict[str, int] = field(default_factory=dict)
    """How, and how often."""
    failures: list[str] = field(default_factory=list)
    """How to repeat them."""
    why_skipped: str = ""


LINES: dict[str, Line] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Let the report say what it is a case of: with `-n` it is read in another process."""
    report = yield
    if marker := item.get_closest_marker("soak"):
        report.user_properties.append(("soak", marker.args[0]))
    return report


def pytest_runtest_logreport(report):
    what = dict(report.user_properties).get("soak")
    if what is None or (report.when != "call" and report.passed):
        return
    line = LINES.setdefault(what, Line(what, report.nodeid.split("[")[0]))
    line.seconds += report.duration
    for name, how in report.user_properties:
        if name == "fell":
            line.fell[how] = line.fell.get(how, 0) + 1
    if report.failed:
        line.failed += 1
        line.failures.append(f"python -m pytest --full '{report.nodeid}'")
    elif report.skipped:
        line.skipped += 1
        line.why_skipped = report.longrepr[2]
    else:
        line.passed += 1


def pytest_terminal_summary(terminalreporter, config):
    if not LINES or not (is_full(config) or any(line.failed for line in LINES.values())):
        return
    terminalreporter.section("soak")
    for line in LINES.values():
        terminalreporter.write_line(f"{line.what}: {line.passed} passed, {line.failed} failed, {line.skipped} skipped; "
                                    + _how(line))  # fmt: skip
        for command in line.failures:
            terminalreporter.write_line(f"  repeat: {command}")


def pytest_sessionfinish(session):
    folder = session.config.getoption("--soak-report", default=None)
    if folder and LINES and not hasattr(session.config, "workerinput"):  # which a process has that works for another, by `-n`
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "soak.json").write_text(json.dumps(report(session.config), indent=1) + "\n")
        (Path(folder) / "soak.md").write_text(markdown(report(session.config)))


def report(config) -> dict:
    """Everything known of this run, as JSON."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    packages = ("torch", "timm", "numpy", "zarr", "numcodecs", "ffcv", "numba", "pillow")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d", time.localtime(STARTED)),
        "seconds": round(time.time() - STARTED),
        "full": is_full(config),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {platform.platform()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cases": [asdict(line) for line in LINES.values()],
    }


def markdown(found: dict) -> str:
    form = "full" if found["full"] else "short"
    lines = [
        f"Commit {found['commit']}, {found['date']}, {form} form, {found['seconds']:,} s. {found['machine']}; Python "
        f"{found['python']}, " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".",
        "",
        "| case | count | held | how they fell |",
        "|---|---|---|---|",
    ]
    for case in found["cases"]:
        line = Line(**case)
        count = line.passed + line.failed
        lines.append(f"| {line.what} | {count:,} | {line.passed:,} | {_how(line)} |")
    return "\n".join(lines) + "\n"


def _how(line: Line) -> str:
    skipped = f"{line.skipped} skipped: {line.why_skipped}" if line.skipped else ""
    told = ", ".join(f"{how} {n:,}" for how, n in sorted(line.fell.items(), key=lambda item: -item[1]))
    return "; ".join(filter(None, (told, skipped)))
