"""teacher-cache inspect: what a cache holds; in what two differ."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from ..terminal.command import one_line_errors
from .options import CACHE, JSON


@click.command()
@CACHE
@click.argument("other", type=click.Path(path_type=Path), required=False)
@JSON
def inspect(cache: Path, other: Path | None, as_json: bool):
    """Say what CACHE holds: crops, teachers, layers, sizes, fidelity, which shards are there. Reads no tokens.

    With OTHER, a second cache, say what is equal and what differs: crops, teachers, settings, quantisers, and shards by their
    checksums. Exit code 0: a student would be given the same. 1: something differs.

    \b
    Example:
      teacher-cache inspect CACHE --json
      teacher-cache inspect CACHE /backup/CACHE
    """
    with one_line_errors("", as_json=as_json):
        from ..cache import Cache
        from ..inspecting.inspect import describe

        if other is not None:
            _compare(Cache(cache), Cache(other), as_json)
            return
        described = describe(Cache(cache))
        if as_json:
            click.echo(json.dumps(described, indent=1))
        else:
            from ..inspecting.table import show

            show(described)


def _compare(cache, other, as_json: bool) -> None:
    from ..inspecting.compare import compare

    lines = compare(cache, other)
    kinds = {line.kind for line in lines}
    equal = False if "differs" in kinds else None if "unknown" in kinds else True
    if as_json:
        click.echo(json.dumps({"paths": [str(cache.path), str(other.path)], "equal": equal,
                               "lines": [dataclasses.asdict(line) for line in lines]}, indent=1))  # fmt: skip
    else:
        for line in lines:
            click.echo(f"{line.kind:<8} {line.what}: {line.text}")
        click.echo({True: "A student would be given the same.", False: f"{cache.path} and {other.path} differ.",
                    None: "Whether a student would be given the same cannot be told from the records."}[equal])  # fmt: skip
    if not equal:
        sys.exit(1)
