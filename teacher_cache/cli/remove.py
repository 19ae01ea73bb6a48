"""teacher-cache remove: a view, or a teacher's targets, deleted for good."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..errors import UsageError
from ..files.claims import taking_over
from ..terminal.command import one_line_errors, say
from ..words import human
from .options import CACHE, TAKE_OVER

INTERRUPTED = "What was begun to be removed is read by nobody; the same command removes the rest."


@click.command()
@CACHE
@click.option("--view", type=click.IntRange(0), help="Remove this view, the last one, with all that is in it.")
@click.option("--store", help="Remove the targets of this store: of all views, or with --view of the last view that has them.")
@click.option("--yes", is_flag=True, help="Do not ask. For scripts.")
@TAKE_OVER
def remove(cache: Path, view: int | None, store: str | None, yes: bool, take_over: bool):
    """Delete a view of CACHE, or a teacher's targets. Says what goes and how many bytes, and asks.

    Only the last view can go, because views are numbered and a run takes them in turn. A run that trained from what is removed
    can no longer be resumed. Refused while somebody writes there. Killed in between, each folder is there as a whole or gone, and
    the same command removes what is left over.

    \b
    Example:
      teacher-cache remove CACHE --store clip-b16
      teacher-cache remove CACHE --view 3 --yes
    """
    with one_line_errors(INTERRUPTED), taking_over(take_over):
        from ..cache import Cache
        from ..extraction.remove import plan_removal

        removal = plan_removal(Cache(cache), view, store)
        say(*removal.in_words())
        if not yes and not _agreed():
            say("Nothing was removed.")
            return
        removal.carry_out()
        say(f"Removed: {human(removal.n_bytes)}.")


def _agreed() -> bool:
    """What the person at the terminal answers. UsageError if there is none."""
    if not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask on, so nothing was removed. Give --yes to remove it without being asked.")
    try:
        return click.confirm("Remove it?", err=True)
    except click.Abort:
        raise KeyboardInterrupt from None
