"""The group of all commands: `teacher-cache`. Each has a file of its own, which parses, calls the library and prints."""

from __future__ import annotations

import click

from .crop import crop
from .estimate import estimate
from .extract import extract
from .inspect import inspect
from .recode import recode
from .remove import remove
from .report import report
from .show import show
from .status import status
from .teachers import teachers
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="teacher-cache")
def main():
    """Run a frozen vision teacher once, keep its tokens, train students from them as often as you like.

    \b
    Example:
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache inspect CACHE

    Exit codes: 0 done; 1 the data or the machine is at fault (verify: not sound; inspect A B: they differ); 2 the command is
    (verify: could not check); 75 stopped by SIGTERM, run the same command again; 130 interrupted. Results go to stdout, all else
    to stderr.
    """


for command in (crop, extract, recode, status, estimate, inspect, show, report, verify, teachers, remove):
    main.add_command(command)
