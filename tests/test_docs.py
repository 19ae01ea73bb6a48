"""The documents say what is so: their commands parse, their small run works, their links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import forks
import pytest
import warm
from fakes import write_images

from scripts import documents

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("teacher_cache/**/*.md")])
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ALL_COMMANDS = list(documents.commands())
"""(the words that call it, command) of every command that does something."""


def command_lines() -> list[tuple[str, str]]:
    """(document, command) of every line in a document that calls one of our programs with arguments."""
    lines = []
    for document in DOCUMENTS:
        for line in document.read_text().replace("\\\n", " ").splitlines():
            match = re.match(r"(?:    |\$ |)((?:teacher-cache|student-(?:train|eval|export|report)) .*)", line)
            if match:
                lines.append((document.name, match[1].split(" #")[0].strip()))
    return lines


@pytest.mark.parametrize("document, line", command_lines(), ids=lambda value: value[:60])
def test_documented_commands_parse(document, line):
    """Every command line in a document uses commands and options that exist."""
    words = shlex.split(line)
    found = [(name.split(), command) for name, command in ALL_COMMANDS if words[: len(name.split())] == name.split()]
    assert found, f"{document}: there is no such command"
    ((name, command),) = found
    command.make_context(line, words[len(name) :])  # raises for unknown options and missing arguments


@pytest.mark.parametrize("name, command", ALL_COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_is_documented(name, command):
    """Every command stands in the README, has a help text with an example, and every option of it says what it does."""
    assert re.search(rf"`{name}[ `]", README)
    assert command.help and "Example:" in command.help and name in command.help.split("Example:")[1]
    silent = [
        p.name for p in command.params if isinstance(p, click.Option) and not p.help and not isinstance(p.type, click.Choice)
    ]
    assert set(silent) <= {"batch_size", "device"}


@pytest.mark.parametrize("name", documents.PAGES)
def test_written_pages_are_current(name):
    """The map and the reference of options are what the modules and commands say of themselves."""
    assert (ROOT / name).read_text() == documents.PAGES[name](), f"{name}: python -m scripts.documents writes it"


def test_the_map_and_the_options_leave_nothing_out():
    """Every module of the three packages has its line on the map, and every option of every command its line."""
    lines, folder, on_map = (ROOT / "docs/map.md").read_text().splitlines(), None, set()
    for line in lines:
        if line.startswith("##"):
            folder = line.split()[1]
        elif match := re.match(r"\| `(\w+\.py)` \| .", line):
            on_map.add(f"{folder}{match[1]}")
    modules = {str(p.relative_to(ROOT)) for r in documents.PACKAGES for p in (ROOT / r).rglob("*.py") if p.name != "__init__.py"}
    assert on_map == modules
    options = (ROOT / "docs/options.md").read_text()
    for name, command in ALL_COMMANDS:
        section = options.split(f"\n## {name}\n")[1].split("\n## ")[0]
        given = {word for p in command.params if isinstance(p, click.Option) for word in p.opts}
        assert set(re.findall(r"(?<=`)--?[a-z][\w-]*(?=`[,| ])", section)) >= given, name


def test_contributing_names_every_room():
    """CONTRIBUTING says what each folder of the three packages is for, and names no folder that is not there."""
    named = set(re.findall(r"^\| `(\w+/[\w/]*)` \|", CONTRIBUTING, re.MULTILINE))
    packages = ("teacher_cache", "student", "pipelines")
    folders = {f"{path.relative_to(ROOT)}/" for r in packages for path in (ROOT / r).iterdir() if (path / "__init__.py").exists()}
    assert named == folders


def said_in_the_source() -> list[str]:
    """Every text in the code of the three packages, on one line, with `…` for what is put into it."""
    texts = []
    for path in (path for r in ("teacher_cache", "student", "pipelines") for path in (ROOT / r).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
                texts.append(" ".join(text.split()))
    return texts


def test_troubleshooting_quotes_the_code():
    """Every message in the first column of a table of docs/troubleshooting.md is one that the code can print."""
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("|")]
    quoted = [words for row in rows for words in re.findall(r"`([^`]{12,})`", row.split("|")[1])]
    assert len(quoted) > 30
    texts = said_in_the_source()
    assert [words for words in quoted if not any(words in text for text in texts)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Every relative link in a document is a file of the project."""
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.slow
def test_readme_block_runs(tmp_path, request):
    """The README's block for trying every step runs from start to end as it stands. With --full a shell runs it, else its lines
    are run in processes in which torch is loaded already."""
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    if request.config.getoption("--full", default=False):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
    else:
        said = "".join(forks.fork(warm.run_line, tmp_path, line).ok().output for line in block.splitlines())
    assert "sound and complete" in said and "knn (DINO)" in said


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
    """No document has a placeholder, and the README stays short and leads to every page of docs/."""
    for document in DOCUMENTS:
        assert "<!--" not in document.read_text(), document
    assert len(README.splitlines()) <= 200
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name}" not in README] == []


def test_files_that_documents_name_exist():
    """A path of this project in a document, such as `teacher_cache/store/reader.py`, is there."""
    a_path = r"`((?:teacher_cache|student|pipelines|tests|benchmarks|scripts)/[\w/]+\.\w+)`"
    named = {(document.name, path) for document in DOCUMENTS for path in re.findall(a_path, document.read_text())}
    assert len(named) > 40
    assert [(name, path) for name, path in sorted(named) if name != "CHANGELOG.md" and not (ROOT / path).exists()] == []
