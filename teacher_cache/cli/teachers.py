"""teacher-cache teachers: which there are."""

from __future__ import annotations

import dataclasses
import json

import click

from ..terminal.command import one_line_errors
from .options import JSON


@click.command()
@JSON
def teachers(as_json: bool):
    """List the teachers: widths, sizes, and where their weights come from.

    \b
    Example:
      teacher-cache teachers
    """
    with one_line_errors(""):
        from ..teachers import OTHER_TEACHERS, TEACHERS

        if as_json:
            click.echo(json.dumps([dataclasses.asdict(entry) for entry in TEACHERS.values()], indent=1))
            return
        for entry in TEACHERS.values():
            projection = f", projection {entry.projection_dim}" if entry.projection_dim else ""
            click.echo(f"{entry.name:<12} {entry.about}")
            click.echo(f"{'':<12} width {entry.dim}, {entry.depth} blocks, {entry.heads} heads, patch {entry.patch_size}, "
                       f"{entry.image_size} px, grid {entry.grid[0]} x {entry.grid[1]}{projection}")  # fmt: skip
            click.echo(f"{'':<12} weights: {entry.weights_from}")
        for name, (about, weights_from) in OTHER_TEACHERS.items():
            click.echo(f"{name:<12} {about}")
            click.echo(f"{'':<12} weights: {weights_from}")
