"""From a template and values to one self-contained HTML file."""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
from markupsafe import Markup

from teacher_cache.errors import UsageError
from teacher_cache.files.durable import write_whole
from teacher_cache.words import human

from .palette import THEMES


def render(template: str, **values) -> str:
    """The page that `template` (a file of this folder) makes of `values`. Text is escaped; a value that is missing raises."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.pages", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bytes": human, "count": lambda number: f"{number:,}", "percent": percent, "moment": moment}
    return environment.get_template(template).render(themes=THEMES, **values)


def percent(share: float) -> str:
    """`99.2 %`; small ones with two digits that count: `0.058 %`. Only what is all is 100 %, only what is none 0 %."""
    if share and abs(share) < 0.01:
        return f"{100 * share:.2g} %"
    if 0.999 <= share < 1:
        return "99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def moment(when: str) -> str:
    """`2026-01-31T12:00:00+00:00` as people write it: `2026-01-31 12:00:00 UTC`."""
    return when.replace("T", " ", 1).replace("+00:00", " UTC")


def data_uri(data: bytes, media_type: str) -> Markup:
    """`data` as the address of an image: `data:image/png;base64,...`."""
    return Markup(f"data:{media_type};base64,{base64.b64encode(data).decode()}")


def require_writable(path: Path, outside_of: Path | None = None) -> None:
    """Raise UsageError unless a file can be put at `path`: asked before the work, not after it.

    outside_of: a cache, into which nothing else may be written: every file in it is accounted for.
    """
    if path.is_dir():
        raise UsageError(f"-o {path}: is a folder. Give the name of a file in it, such as {path / 'out'}.")
    if path.exists() and not path.is_file():
        raise UsageError(f"-o {path}: is no plain file. Give the name of a new one.")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}. Make it first: mkdir -p {path.parent}")
    if outside_of is not None and path.parent.resolve().is_relative_to(outside_of.resolve()):
        raise UsageError(f"-o {path}: lies in the cache, where verify would not know it. Give a place outside of {outside_of}.")


def require_page(path: Path, outside_of: Path | None = None) -> None:
    """`require_writable` of a file that ends as a page does: nothing else is ever replaced by one."""
    require_writable(path, outside_of)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {path}: the report is a page. Give a name that ends in .html.")


def write_page(path: Path, html: str) -> int:
    """Write a page aside and rename it; returns its bytes."""
    data = html.encode()
    write_whole(path, data)
    return len(data)
