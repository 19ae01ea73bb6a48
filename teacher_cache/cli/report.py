"""teacher-cache report: a page about a cache."""

from __future__ import annotations

from pathlib import Path

import click

from ..terminal.command import one_line_errors, say
from ..words import human
from .options import CACHE, STORE, VIEW


@click.command()
@CACHE
@VIEW
@STORE
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page.")
@click.option("--rows", type=click.IntRange(4, 20_000), default=2000, show_default=True, help="Crops whose tokens are looked at.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of that sample, and of the map.")
@click.option("--verify", is_flag=True, help="Run verify now and put what it finds on the page.")
@click.option("--sample", type=click.IntRange(1), help="Rows of each store and view that --verify checks. [default: all]")
@click.option("--verified", type=click.Path(path_type=Path), help="Output of verify --json, in place of --verify.")
@click.option("--weights", help="The teacher's weights: run it on 64 crops and measure the true error of what is stored. A file, "
              "random:SEED or built-in.")  # fmt: skip
def report(cache: Path, out: Path, **options):
    """Write one page about CACHE: identity, coverage, fidelity, layers, attention, crop boxes, neighbours, a map.

    The page is a single file that loads nothing, for any browser. It looks closely at one store of one view, on a sample of its
    crops, so that its time does not grow with the cache; coverage and sizes are of everything. Nothing is written into CACHE.

    \b
    Example:
      teacher-cache report CACHE -o report.html
      teacher-cache report --verify --sample 1000 --weights ViT-B-16.pt CACHE
    """
    with one_line_errors(""):
        from pipelines.pages.of_cache.cache_report import Options
        from pipelines.pages.of_cache.cache_report import report as write

        n_bytes = write(cache, out, Options(**options), say)
        say(f"Wrote {out} ({human(n_bytes)})")
