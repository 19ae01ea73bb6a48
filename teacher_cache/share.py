"""Which part of an extraction is this process's: all of it, or under torchrun its rank's share."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Share:
    """One of `world` processes that torchrun started, `local_world` of them on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def of_this_process(cls, shards: range | None = None, repair: bool = False, device: str = "auto") -> Share:
        """As torchrun's environment says. UsageError for what only one process may do or say.

        To be called before numba is imported: processes on one machine share its processors too.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [os.environ.get(name, "") for name in names]
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()  # other launchers set some of these names too, for programs that are not this one
        if not all(value.isdecimal() for value in given):
            raise UsageError(f"torchrun's {', '.join(names)} must be numbers, not {given}.")
        share = cls(*map(int, given))
        if not (share.rank < share.world and share.local_rank < share.local_world):
            raise UsageError(f"torchrun's {', '.join(names)} do not fit together: {', '.join(given)}.")
        if share.world > 1 and device not in ("auto", "cuda", "cpu"):
            raise UsageError(
                f"--device {device}: {share.world} processes were started; each takes its own GPU. Give auto, cuda or cpu."
            )
        if share.world > 1 and shards is not None:
            raise UsageError("--shards: torchrun's processes share the shards among themselves. Leave it out.")
        if share.world > 1 and repair:
            raise UsageError("--repair is for one process. Run it without torchrun.")
        if share.local_world > 1:
            os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // share.local_world)))
        return share

    def shards(self, asked: range | None, n_shards: int) -> range | None:
        """The shards of this process: those asked for, or of all of them as many as any other rank, or one less."""
        if self.world == 1:
            return asked
        return range(n_shards * self.rank // self.world, n_shards * (self.rank + 1) // self.world)
