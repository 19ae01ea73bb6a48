"""What the options of the commands have in common."""

from __future__ import annotations

from pathlib import Path

import click

from teacher_cache.errors import UsageError

from ..errors import ConfigError, RunMismatchError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
PATH = click.Path(path_type=Path)
COMMAND_AT_FAULT = (ConfigError, RunMismatchError)
"""Errors of `student` that another command would not have met."""


def pairs_of(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    split = [pair.partition("=") for pair in pairs]
    for key, sign, _ in split:
        if not sign or not key:
            raise UsageError(f"{option} {key}: give key=value, for example --set batch_size=32 or --change optim.base_lr=1e-4.")
    return {key: value for key, _, value in split}
