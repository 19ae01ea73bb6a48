"""Which shards of an extraction are this process's: all of them, or under torchrun those of its rank."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import UsageError


def share_processors(n_processes: int) -> None:
    """Have numba take as many threads as there are processors for each of `n_processes` here. Call it before numba is there."""
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))


@dataclass(frozen=True)
class Process:
    """One of `world_size` processes that torchrun started, `local_world_size` of them on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def current(cls, shards: range | None = None, repair: bool = False) -> Process:
        """This one, as torchrun's environment says. UsageError for what only one process may do or say.

        To be called before numba is imported: processes on one machine share its processors too.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [os.environ.get(name, "") for name in names]
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()  # other launchers set some of these names too, for programs that are not this one
        if not all(value.isdecimal() for value in given):
            raise UsageError(f"torchrun's {', '.join(names)} must be numbers, not {given}.")
        process = cls(*map(int, given))
        if process.world_size > 1 and shards is not None:
            raise UsageError("--shards: torchrun's processes share the shards among themselves. Leave it out.")
        if process.world_size > 1 and repair:
            raise UsageError("--repair is for one process. Run it without torchrun.")
        if process.local_world_size > 1:
            share_processors(process.local_world_size)
        return process

    def require_own_device(self, device: str) -> None:
        """Raise UsageError for a GPU by its number where several processes would all take it."""
        if self.local_world_size > 1 and device.startswith("cuda:"):
            raise UsageError(
                f"--device {device}: torchrun started {self.local_world_size} processes on this machine, and all of them would "
                "take that one GPU. Give auto or cuda, and each takes its own; CUDA_VISIBLE_DEVICES says which there are."
            )

    def shards(self, asked: range | None, n_shards: int) -> range | None:
        """The shards of this process: those asked for, or of all of them as many as any other rank, or one less."""
        if self.world_size == 1:
            return asked
        return range(n_shards * self.rank // self.world_size, n_shards * (self.rank + 1) // self.world_size)
