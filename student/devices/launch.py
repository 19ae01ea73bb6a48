"""Who started this process, and how many others: what torchrun (or srun, or any launcher that sets the same names) says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Without these the processes of a run cannot find each other."""


@dataclass(frozen=True)
class Launch:
    """This process among those of its run."""

    n_processes: int
    local_rank: int
    """Its number on this machine."""


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch:
    """As the environment says. One process alone where it says nothing.

    Raises ConfigError where it says half of it, as a WORLD_SIZE does that an earlier command or a batch system has left: to
    wait for processes that nobody started would be for ever.
    """
    n_processes = _number(environment, "WORLD_SIZE", 1, least=1)
    if n_processes == 1:
        return Launch(1, 0)
    if missing := [name for name in MEETING if not environment.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE={n_processes} says that {n_processes} processes train together, and {', '.join(missing)}, by which they "
            "find each other, are not set. To train in several, start with torchrun --nproc-per-node N -m student ...; to train "
            "in one, unset WORLD_SIZE."
        )
    rank = _number(environment, "RANK", 0, least=0)
    if rank >= n_processes:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={n_processes}. Start with torchrun, or unset both.")
    return Launch(n_processes, _number(environment, "LOCAL_RANK", 0, least=0))


def _number(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise ConfigError(f"{name}={text} in the environment is no number from {least}. Start with torchrun, or unset it.")
    return int(text)
