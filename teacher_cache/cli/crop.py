"""teacher-cache crop: the crops of a cache, without a teacher."""

from __future__ import annotations

from pathlib import Path

import click

from ..files.claims import taking_over
from ..terminal.command import one_line_errors, say
from ..words import quoted
from .options import CACHE, CROP_OPTIONS, DRY_RUN, KEPT, REPAIR, TAKE_OVER, with_preset
from .repair import refuse_beside_repair, repair_and_say


@click.command()
@CACHE
@CROP_OPTIONS
@REPAIR
@TAKE_OVER
@DRY_RUN
def crop(cache: Path, repair: bool, take_over: bool, dry_run: bool, skip_bad: bool, workers: int | None, **options):
    """Draw, cut and store the crops of CACHE, without a teacher.

    Needs the originals once; `extract` then reads the crops. Interrupted, it goes on where it stopped. With --repair it mends the
    lists and crops of a finished CACHE and makes nothing new; --images are needed only for crops that have to be cut again.

    A crop has any side from 8 to 4096 pixels. Random crops above 256 need this version of the program or a later one to be read.
    Hidden files and folders, and those of file systems (lost+found), are left out.

    \b
    Example:
      teacher-cache crop --images imagenet/train --views 2 CACHE
      teacher-cache crop --repair --images imagenet/train CACHE
    """
    with one_line_errors(KEPT), taking_over(take_over):
        from ..extraction.make import plan_cache
        from ..extraction.planning import CropRequest

        if repair:
            refuse_beside_repair(cache, dry_run)
            repair_and_say(cache, options["images"])
            return
        work = plan_cache(cache, CropRequest(**with_preset(options)))
        if not dry_run and work.make(skip_bad, workers).is_new:
            say(f"Done. Next: teacher-cache extract --teacher NAME {quoted(cache)}")
