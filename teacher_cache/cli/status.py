"""teacher-cache status: how far a cache is, who works on it, what failed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from ..terminal.command import one_line_errors
from ..terminal.progress import clock
from ..words import quoted
from .options import CACHE, JSON


@click.command()
@CACHE
@click.option("--watch", is_flag=True, help="Look again and again, until all is made.")
@click.option("--every", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Seconds between two looks of --watch.")
@JSON
def status(cache: Path, watch: bool, every: float, as_json: bool):
    """Say how far CACHE is: shards made, in work and free, who works where since when, how fast, and what failed last.

    From the disk alone: any machine that sees CACHE can ask, nothing is written, and no worker notices. With --watch and --json,
    a line a look.

    \b
    Example:
      teacher-cache status CACHE --watch
      teacher-cache status CACHE --json
    """
    with one_line_errors("", as_json=as_json):
        from ..inspecting.status import Watcher

        watcher = Watcher(cache)
        while True:
            found = watcher.look()
            if as_json:
                click.echo(json.dumps(found, indent=None if watch else 1))
            else:
                if watch and sys.stdout.isatty():
                    click.clear()
                click.echo("\n".join(_lines(found)))
            if found["is_done"] or not watch:
                return
            time.sleep(every)


def _lines(found: dict) -> Iterator[str]:
    crops = found["crops"]
    if crops["is_done"]:
        yield f"{found['path']}: {crops['images']:,} images, {len(found['views'])} view{'s' * (len(found['views']) != 1)}"
    else:
        yield f"{found['path']}: {crops['images']:,} images, crops are being made"
        for view, (n_made, n_parts) in crops["views"].items():
            yield f"view {view}  {n_made:,} of {n_parts:,} parts cut"
        yield from map(_worker, crops["workers"])
        if not crops["workers"]:
            yield f"  nobody is at it: run the same command again ({quoted(found['path'])})"
    for view in found["views"]:
        for store in view["stores"]:
            yield from _store(view["view"], store)
    if found["left_s"]:
        yield f"in all  {found['rate']:,.3g} crops/s, {clock(found['left_s'])} left"


def _store(view: int, store: dict) -> Iterator[str]:
    what = f"view {view}  {store['name']}"
    if not store["is_begun"]:
        yield f"{what}  being begun"
    elif store["is_complete"]:
        yield f"{what}  complete, {store['shards']:,} shards"
    else:
        speed = f", {store['rate']:,.3g} crops/s, {clock(store['left_s'])} left" if store["left_s"] else ""
        yield (f"{what}  {store['made']:,} of {store['shards']:,} shards made, {store['in_work']:,} in work, "
               f"{store['free']:,} free{speed}")  # fmt: skip
    yield from map(_worker, [*store["claimed_by"], *store["workers"]])
    for failed in store["failed"]:
        first, stop = failed["shards"]
        state = "left" if failed["is_left"] else f"failed {failed['times']} of {failed['tries']} times"
        yield (f"  shards {first}:{stop}  {state}: {failed['error']} (process {failed['pid']} on host {failed['host']}, "
               f"{failed['at']})")  # fmt: skip


def _worker(worker: dict) -> str:
    shards = f"shards {worker['shards'][0]}:{worker['shards'][1]}  " if "shards" in worker else ""
    speed = f", {worker['rate']:,.3g} crops/s" if worker["rate"] else ""
    since = f" since {worker['since']}" if worker["since"] else ""
    doubt = "" if worker["is_seen"] else ", if it still lives: --watch sees"
    return f"  {shards}process {worker['pid']} on host {worker['host']}{since}{speed}{doubt}"
