"""student-report: the page of a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from teacher_cache.errors import UsageError
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.words import human, quoted

from ..errors import StudentError
from .options import COMMAND_AT_FAULT, PATH, SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("run", type=PATH)
@click.option("-o", "--out", type=PATH, help="The page: one HTML file. Needed unless --json is given.")
@click.option("--cache", type=PATH, help="Where the run's cache lies now. [default: where it was when the run began]")
@click.option("--crops", "n_crops", type=click.IntRange(1, 24), default=6, show_default=True, help="How many crops are shown.")
@click.option("--json", "as_json", is_flag=True, help="What the page says in numbers, machine-readable, on stdout.")
def report(run: Path, out: Path | None, cache: Path | None, n_crops: int, as_json: bool):
    """Make a page about a run: its curves, what its student predicts and attends to, its settings.

    One HTML file that loads nothing from anywhere. The pictures need the cache of the run; if that is gone, the page has
    everything else and says so. A run that goes on can be looked at while it does.

    \b
    Example:
      student-report runs/a -o a.html
      student-report runs/a -o a.html --cache /new/place/of/CACHE
    """
    with one_line_errors("Nothing was written.", COMMAND_AT_FAULT, (StudentError,)):
        if out is None and not as_json:
            raise UsageError(f"-o is missing: student-report {quoted(run)} -o run.html (or --json).")
        from pipelines.pages.of_run.run_facts import read_run

        facts = read_run(run)
        if as_json:
            click.echo(json.dumps(facts.to_json(), indent=1))
        if out is not None:
            from pipelines.pages.of_run.run_report import run_page
            from pipelines.pages.page import require_page, write_page

            data_from = facts.description.get("data_from")
            require_page(out, outside_of=cache or (Path(data_from) if isinstance(data_from, str) else None))
            html, missing = run_page(facts, cache, n_crops)
            n_bytes = write_page(out, html)
            say(*(f"note     {line}" for line in missing), f"{out}: {human(n_bytes)}")
