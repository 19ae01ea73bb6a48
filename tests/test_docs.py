"""The documents say what is so: their commands parse, their small run works, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from fakes import write_images

from student.cli.commands import evaluate, report, train
from teacher_cache.cli.main import main as teacher_cache

ROOT = Path(__file__).parent.parent
PROGRAMS = {"teacher-cache": teacher_cache, "student-train": train, "student-eval": evaluate, "student-report": report}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("teacher_cache/**/*.md")])
README = (ROOT / "README.md").read_text()


def command_lines() -> list[tuple[str, str]]:
    """(document, command) of every line in a document that calls one of our programs with arguments."""
    lines = []
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            match = re.match(r"(?:    |\$ |)((?:teacher-cache|student-train|student-eval|student-report) .*)", line)
            if match:
                lines.append((document.name, match[1].split(" #")[0].strip()))
    return lines


def leaves(name: str, command: click.Command):
    """Every command that does something, with the words that call it."""
    if isinstance(command, click.Group):
        return [leaf for word, inner in command.commands.items() for leaf in leaves(f"{name} {word}", inner)]
    return [(name, command)]


ALL_COMMANDS = [leaf for name, command in PROGRAMS.items() for leaf in leaves(name, command)]


@pytest.mark.parametrize("document, line", command_lines(), ids=lambda value: value[:60])
def test_documented_commands_parse(document, line):
    """Every command line in a document uses commands and options that exist."""
    program, *arguments = shlex.split(line)
    command = PROGRAMS[program]
    while isinstance(command, click.Group):
        word, *arguments = arguments
        assert word in command.commands, f"{document}: {program} has no command {word}"
        command = command.commands[word]
    command.make_context(program, arguments)  # raises for unknown options and missing arguments


@pytest.mark.parametrize("name, command", ALL_COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_documented(name, command):
    """Every command stands in the README, has a help text with an example, and every option of it says what it does."""
    assert re.search(rf"`{name}[ `]", README)
    assert command.help and "Example:" in command.help and name in command.help.split("Example:")[1]
    silent = [
        p.name for p in command.params if isinstance(p, click.Option) and not p.help and not isinstance(p.type, click.Choice)
    ]
    assert set(silent) <= {"batch_size", "device"}


def test_the_map_names_files_that_exist():
    """The README's map lists every module, and nothing that is not there."""
    section = README.split("## Map")[1].split("Arrows:")[0]
    room, named = None, set()
    for line in section.splitlines():
        if line.startswith("      "):
            named |= {f"{room}/{word}" for word in line[6:28].split() if re.fullmatch(r"\w+(\.py|/)", word)}
        elif line.strip():
            room = line.split()[0].rstrip("/")
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    modules = {f"{r}/{p.name}" for r in ("teacher_cache", "student", "pipelines") for p in (ROOT / r).glob("*.py")}
    small = {"__init__.py", "errors.py", "progress.py", "device.py", "cli.py", "positions.py", "initial_weights.py", "seeds.py",
             "interrupts.py", "run_directory.py", "optim.py", "targets.py"}  # fmt: skip
    assert {name for name in modules - named if name.split("/")[1] not in small} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Every relative link in a document is a file of the project."""
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.slow
def test_readme_block_runs(tmp_path):
    """The README's block for trying every step runs from start to end as it stands."""
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sound and complete" in done.stdout and "mean  k=20" in done.stdout


@pytest.mark.slow
def test_the_lines_of_the_library_run(tmp_path):
    """The README's lines for library users run as they stand: a cache from a folder of images, a run that is there."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 10
    write_images(tmp_path / "digits" / "val")
    shutil.copytree(ROOT / "tests" / "golden" / "run_v1", tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines() == 3 * ["torch.Size([8, 3, 32, 32]) torch.Size([8, 2, 65, 64]) torch.Size([8, 64])"]


def test_nothing_is_left_to_fill_in():
    """No document has a placeholder, and every path that the map names as a document exists."""
    for document in DOCUMENTS:
        assert "<!--" not in document.read_text(), document
    for name in re.findall(r"(?:docs/)?([\w/]+\.md|design/)", README.split("## Map")[1].split("Arrows:")[0]):
        assert (ROOT / "docs" / name).exists(), name
