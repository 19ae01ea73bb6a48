"""How a step is cut up: over processes, and in each into what its device holds at once. What a run learns does not depend on it.

A step of `world` processes with A micro-batches each has world * A micro-batches of equal size. The i-th of process r is number
i * world + r of the step, so the i-th micro-batches of all processes are neighbouring rows, however many processes there are.
"""

from __future__ import annotations

from ..config import TrainConfig
from ..errors import ConfigError


def number_in_step(index: int, rank: int, world: int) -> int:
    """The number, among all of its step, of micro-batch `index` of process `rank`."""
    return index * world + rank


def micro_batches(config: TrainConfig, world: int, micro_batch: int | None = None) -> int:
    """A, the micro-batches a process takes in a step, of `micro_batch` crops each; by default `config.accumulate`.

    Raises ConfigError if the batch cannot be cut so, or if a loss takes statistics over micro-batches and is to take others.
    """
    batch_size = config.batch_size
    if micro_batch is None:
        n_micro_batches = config.accumulate * world
        if batch_size % n_micro_batches:
            raise ConfigError(
                f"batch_size={batch_size} cannot be cut into equal parts for accumulate={config.accumulate} and "
                f"{world} processes. Take a multiple of {n_micro_batches}."
            )
        return config.accumulate
    if batch_size % (world * micro_batch):
        if batch_size % world:
            raise ConfigError(f"batch_size={batch_size} cannot be shared by {world} processes. Start a number that divides it.")
        share = batch_size // world
        fitting = ", ".join(str(n) for n in range(share, 0, -1) if share % n == 0)
        raise ConfigError(
            f"micro_batch={micro_batch}: the {share} crops that each of {world} processes takes of batch_size={batch_size} "
            f"cannot be cut so. Give one of {fitting}."
        )
    n = batch_size // (world * micro_batch)
    if n != config.accumulate and takes_statistics(config):
        raise ConfigError(
            f"micro_batch={micro_batch}: the batch norm of the objective contrast takes its statistics over the micro-batches "
            f"of all processes, {batch_size // config.accumulate} crops in this run; others would be another run. With {world} "
            f"processes leave it out, or start a new run with --set accumulate={n}."
        )
    return n


def takes_statistics(config: TrainConfig) -> bool:
    """Whether a loss depends on how many micro-batches a step is cut into (not on how many processes share them)."""
    return any(objective.kind == "contrast" for objective in config.objectives)
