"""`python -m scripts.documents`: docs/map.md from the docstrings of all modules, docs/options.md from the commands themselves."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("teacher_cache", "student", "pipelines", "benchmarks")
LINE = 120
"""Characters of a docstring that a line of the map has room for; it gets one sentence at least."""

MAP_HEAD = """# Map

Written by `python -m scripts.documents` from the docstrings of the modules, by room. What may import what:
[design/0001](design/0001-rooms-and-arrows.md). How to add to it: [CONTRIBUTING.md](../CONTRIBUTING.md).
"""
OPTIONS_HEAD = """# Options

Written by `python -m scripts.documents` from the commands themselves; `COMMAND --help` says the same. All have `-h`, `--help`.

Exit codes: 0 done, 1 the data or the machine is at fault (`verify`: not sound; `inspect A B`: they differ), 2 the command is
(`verify`: could not check), 75 stopped by SIGTERM (the same command goes on), 130 interrupted. Results go to stdout, all else to
stderr.

Tab completion, in bash (zsh and fish: `zsh_source`, `fish_source`), for this shell or in its start-up file:

    eval "$(_TEACHER_CACHE_COMPLETE=bash_source teacher-cache)"
    eval "$(_STUDENT_TRAIN_COMPLETE=bash_source student-train)"
"""


def about(path: Path) -> str:
    """What the docstring of a module says first. ValueError if it says nothing."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring. Its first sentence is its line in docs/map.md.")
    said, *sentences = re.split(r"(?<=[.?!]) (?=[A-Z0-9`])", " ".join(text.split("\n\n")[0].split()))
    for sentence in sentences:
        if len(said) + 1 + len(sentence) > LINE:
            break
        said += f" {sentence}"
    return said


def map_page() -> str:
    """docs/map.md: a table for every folder with code in it."""
    lines = [MAP_HEAD]
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            name = folder.relative_to(ROOT).as_posix()
            lines += [f"{'#' if folder.parent == ROOT else '##'}# {name}/", "", about(folder / "__init__.py"), ""]
            modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
            lines += ["| module | |", "|---|---|"] * bool(modules)
            lines += [f"| `{path.name}` | {_in_cell(about(path))} |" for path in modules]
            lines += [""] * bool(modules)
    return "\n".join(lines).rstrip() + "\n"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it, as the console scripts of setup.cfg find it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].strip().splitlines():
        name, module, function = re.fullmatch(r"([\w-]+) *= *([\w.]+):(\w+)", line.strip()).groups()
        yield from _leaves(name, _behind(importlib.import_module(module), function))


def _behind(module, function: str) -> click.Command:
    """The command that a console script would run."""
    found: list[click.Command] = []
    with mock.patch.object(module, "run_program", lambda load: found.append(load())):
        getattr(module, function)()
    return found[0]


def _leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for word, inner in command.commands.items():
            yield from _leaves(f"{name} {word}", inner)
    else:
        yield name, command


def options_page() -> str:
    """docs/options.md: usage, purpose and a table of options for every command."""
    lines = [OPTIONS_HEAD]
    for name, command in commands():
        context = click.Context(command, info_name=name)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        first = " ".join(inspect.cleandoc(command.help).split("\n\n")[0].split())
        lines += [f"## {name}", "", f"{first} `{usage}`", "", "| option | takes | default | |", "|---|---|---|---|"]
        for option in command.params:
            if isinstance(option, click.Option):
                default, what = _default(option, context)
                cells = [", ".join(f"`{word}`" for word in reversed(option.opts)), _takes(option), default, what]
                lines.append(f"| {' | '.join(map(_in_cell, cells))} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _takes(option: click.Option) -> str:
    """What kind of value an option takes, in words; empty for a switch."""
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        number = "integer" if isinstance(kind, click.IntRange) else "number"
        above = f" {'above' if kind.min_open else 'from'} {kind.min}"
        return f"{number}{above}{f' to {kind.max}' if kind.max is not None else ''}"
    word = option.metavar or kind.name
    return word if word.islower() else f"`{word}`"


def _default(option: click.Option, context: click.Context) -> tuple[str, str]:
    """(default, the help text without it)."""
    what, _, said = (option.help or "").partition("[default: ")
    if said:
        return said.rstrip("] "), what.strip()
    if option.required:
        return "required", what.strip()
    has_default = option.show_default and not option.is_flag
    return (str(option.get_default(context)) if has_default else ""), what.strip()


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"docs/map.md": map_page, "docs/options.md": options_page}


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / name).write_text(page())
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
