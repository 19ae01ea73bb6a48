"""teacher-cache verify: is every byte the one that was written."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from ..terminal.command import one_line_errors
from .options import CACHE, JSON


@click.command()
@CACHE
@JSON
@click.option("--sample", type=click.IntRange(1), help="Check so many rows of each store and view, drawn at random, besides all "
              "small files, sizes and headers. [default: all rows; 64 for --images and --weights]")  # fmt: skip
@click.option("--images", type=click.Path(path_type=Path), help="The originals: cut a sample of crops again and compare.")
@click.option("--weights", help="The teacher's weights: run it on a sample of rows and compare. A file, random:SEED or built-in.")
@click.option("--teacher", help="Which store --weights belongs to, if there are several.")
def verify(cache: Path, as_json: bool, sample: int | None, images: Path | None, weights: str | None, teacher: str | None):
    """Check every byte of CACHE against the recorded checksums, that every row is there, and that the values make sense.

    Exit code 0: sound and complete. 1: damaged or unfinished. 2: could not check. Says which command mends what was found.

    \b
    Example:
      teacher-cache verify CACHE && student-train --cache CACHE --preset maskalign-b16 --out RUN
      teacher-cache verify --sample 1000 --images imagenet/train --weights ViT-B-16.pt CACHE
    """
    with one_line_errors("Nothing was changed.", as_json=as_json):
        from ..checking.check import check

        checked = check(cache, sample=sample, images=images, weights=weights, teacher=teacher)
        if as_json:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            said = {"path": str(cache), "crops_id": checked.crops_id, "when": when, "sample": sample,
                    "sound": not checked.findings, **dataclasses.asdict(checked.checked), "mend": checked.mending}  # fmt: skip
            click.echo(json.dumps({**said, "findings": list(map(dataclasses.asdict, checked.findings))}, indent=1))
        else:
            _print_findings(cache, checked.findings, checked.checked.in_words(), checked.mending)
        if checked.findings:
            sys.exit(2 if all(finding.kind == "unchecked" for finding in checked.findings) else 1)


def _print_findings(cache: Path, findings: list, checked: list[str], commands: list[str]) -> None:
    """A table on a terminal, a line each in a pipe; then what mends them."""
    if sys.stdout.isatty() and findings:
        from rich.console import Console

        Console().print(findings_table(cache, findings))
    else:
        for finding in findings:
            click.echo(f"{finding.kind:<10} {finding.path}: {finding.message}")
    n_findings = f"{len(findings)} finding{'s' * (len(findings) != 1)}." if findings else "sound and complete."
    click.echo("\n  ".join([f"{checked[0]} checked: {n_findings}", *checked[1:]]))
    if commands:
        click.echo("\n  ".join(["To mend it:", *commands]))


def findings_table(cache: Path, findings: list):
    from rich.table import Table
    from rich.text import Text

    table = Table("", "where", "what")
    for finding in findings:  # as Text, because names may hold what rich takes for markup
        table.add_row(finding.kind, Text(str(Path(finding.path).relative_to(cache))), Text(finding.message))
    return table
