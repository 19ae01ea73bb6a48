"""teacher-cache recode: a store coded by a transform, from one that is there."""

from __future__ import annotations

from pathlib import Path

import click

from ..files.claims import taking_over
from ..format.dtypes import DEFAULT_KLT
from ..terminal.command import one_line_errors, say
from ..words import quoted
from .options import CACHE, KEPT, REPAIR, TAKE_OVER, Dtype
from .repair import repair_and_say


@click.command()
@CACHE
@click.option("--store", required=True, help="The store that is read: int8, int4 or float16, complete.")
@click.option("--dtype", type=Dtype(), default=DEFAULT_KLT, show_default=True, help="klt:BITS, bits a value on average, 1 to 6.")
@click.option("--name", required=True, help="Of the new store.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@REPAIR
@TAKE_OVER
def recode(cache: Path, store: str, dtype: str, name: str, device: str, repair: bool, take_over: bool):
    """Code the targets of a store again by a transform, in fewer bytes, without the teacher.

    In every view that has the store. The new store names the one it was made from, and records how far its tokens are off from
    that. Interrupted, the same command goes on. The old store stays: teacher-cache remove deletes it.

    \b
    Example:
      teacher-cache recode CACHE --store clip-b16 --dtype klt:3.2 --name clip-b16-klt
    """
    with one_line_errors(KEPT), taking_over(take_over):
        from ..cache import Cache
        from ..extraction import recode as recoding

        if repair:
            repair_and_say(cache, None, name)
        opened = Cache(cache)
        if not recoding.recode(opened, store, dtype, name, device):
            say(f"{cache} already holds {name}, made from {store}. Nothing to do.")
            return
        say(*recoding.tell(opened.view(0).store_path(name)))
        say(f"Done. Next: teacher-cache inspect {quoted(cache)}; the old store goes with teacher-cache remove --store {store}.")
