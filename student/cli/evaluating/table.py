"""student-eval table: results on record, side by side where they can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..options import PATH
from .job import ending, table_of


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--what", "whats", multiple=True, help="Only of these, as they were asked for.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: a list of groups of records, the best first.")
def table(files: tuple[Path, ...], whats: tuple[str, ...], as_json: bool):
    """Show the results that --record has written, one table for each protocol.

    Results are ranked against each other only if protocol, layer, share, number of seeds and images are the same.

    \b
    Example:
      student-eval table results.jsonl
    """
    with ending():
        from ...evals.records import groups, read

        records = [record for path in files for record in read(path)]
        grouped = groups([record for record in records if not whats or record["what"] in whats])
        if as_json:
            click.echo(json.dumps(grouped))
            return
        for group in grouped:
            click.echo(table_of(group))
