"""student-report: the page of a run, or of several."""

from __future__ import annotations

import json
from pathlib import Path

import click

from teacher_cache.errors import TeacherCacheError, UsageError
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.words import human, quoted

from ..errors import StudentError
from .options import COMMAND_AT_FAULT, PATH, SETTINGS

MOST_RUNS = 18
"""On one page: so many lines can be told apart (pipelines/pages/of_run/comparison.py)."""


@click.command(context_settings=SETTINGS)
@click.argument("runs", metavar="RUN...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="The page: one HTML file. Needed unless --json is given.")
@click.option("--cache", type=PATH, help="Where the run's cache lies now. [default: where it was when the run began]")
@click.option("--crops", "n_crops", type=click.IntRange(1, 24), help="How many crops of one run are shown. [default: 6]")
@click.option("--evaluations", type=PATH, multiple=True, help="Show what this file of student-eval --record says of the runs, "
              "and of others by the same protocol. Repeatable. [default: evaluations.jsonl in a run]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="What the page says in numbers, machine-readable, on stdout.")
def report(runs: tuple[Path, ...], out: Path | None, cache: Path | None, n_crops: int | None, evaluations: tuple[Path, ...],
           as_json: bool):  # fmt: skip
    """Make a page about a run, or about several.

    Of a run: its curves, evaluations, what its student predicts and attends to, its settings. Of several: their curves on each
    other, what differs in their settings, evaluations side by side.

    One HTML file that loads nothing from anywhere. The pictures need the cache of the run; if that is gone, the page has
    everything else and says so. A run that goes on can be looked at while it does.

    \b
    Example:
      student-report runs/a -o a.html
      student-report runs/a -o a.html --cache /new/place/of/CACHE
      student-report runs/a runs/b runs/c --evaluations results.jsonl -o three.html
    """
    with one_line_errors("Nothing was written.", COMMAND_AT_FAULT, (StudentError,)):
        if out is None and not as_json:
            raise UsageError(f"-o is missing: student-report {' '.join(map(quoted, runs))} -o run.html (or --json).")
        _require_fitting_options(runs, cache, n_crops)
        from pipelines.pages.of_run.comparison import names_of
        from pipelines.pages.of_run.evaluations import Evaluations, records_of
        from pipelines.pages.of_run.run_facts import read_run

        facts = [read_run(run) for run in runs]
        names, records = names_of(facts), records_of(facts, evaluations)
        folders = {run.path.resolve(): name for run, name in zip(facts, names, strict=True)}
        found = Evaluations(records, _weights_of(facts, names) if records else {}, folders)
        if as_json:
            told = [{**run.to_json(), "evaluations": [record for record in records if found.run_of(record) == name]}
                    for run, name in zip(facts, names, strict=True)]  # fmt: skip
            click.echo(json.dumps(told[0] if len(runs) == 1 else {"runs": told}, indent=1))
        if out is not None:
            from pipelines.pages.page import require_page, write_page

            for run in facts:
                data_from = run.description.get("data_from")
                require_page(out, outside_of=cache or (Path(data_from) if isinstance(data_from, str) else None))
            if evaluations and not found.tables():
                _refuse_foreign(evaluations, runs)
            if len(runs) == 1:
                from pipelines.pages.of_run.run_report import run_page

                html, missing = run_page(facts[0], cache, n_crops or 6, found)
            else:
                from pipelines.pages.of_run.comparison import comparison_page

                html, missing = comparison_page(facts, names, found)
            n_bytes = write_page(out, html)
            say(*(f"note     {line}" for line in missing), f"{out}: {human(n_bytes)}")


def _require_fitting_options(runs: tuple[Path, ...], cache: Path | None, n_crops: int | None) -> None:
    if len(runs) > 1 and (cache or n_crops):
        option = "--cache" if cache else "--crops"
        raise UsageError(f"{option} is about the pictures of one run; of several none are shown. Leave it out.")
    if len(runs) > MOST_RUNS:
        raise UsageError(f"{len(runs)} runs are given; the lines of {MOST_RUNS} can be told apart. Give fewer.")
    if again := [run for n, run in enumerate(runs) if run.resolve() in {other.resolve() for other in runs[:n]}]:
        raise UsageError(f"{again[0]} is given twice. Give each run once.")


def _weights_of(facts: list, names: list[str]) -> dict[str, str]:
    """Weights of the newest checkpoint of each run, as records have them, averaged ones too -> name of the run.

    A checkpoint that cannot be read, or is gone because its run goes on, is said and left out.
    """
    from .evaluating.subjects import Resolver

    found = {}
    for run, name in zip(facts, names, strict=True):
        for checkpoint in list(run.checkpoints)[-1:]:
            try:
                for averaged in (False, True) if run.config.optim.ema else (False,):
                    resolver = Resolver(averaged=averaged, whats=(str(checkpoint),))
                    found.setdefault(resolver.subject(str(checkpoint)).weights, name)
            except (StudentError, TeacherCacheError, FileNotFoundError) as error:
                say(f"note     {name}: evaluations are known to be of it by their place alone. {error}")
    return found


def _refuse_foreign(files: tuple[Path, ...], runs: tuple[Path, ...]) -> None:
    raise UsageError(
        f"--evaluations {', '.join(map(str, files))}: no record is of {' or '.join(map(str, runs))}. Make one: student-eval knn "
        f"{quoted(runs[0])} --train DIR --val DIR --record FILE."
    )
