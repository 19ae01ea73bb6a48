"""A store while it is filled, whatever it is filled from: begun once, and completed by whoever makes the last shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import ClaimLostError, NotInCacheError
from ..files.claims import claimed, is_claimed_or_left
from ..format.layout import store_claim, store_claims
from ..store import failures
from ..store.folding import fold, is_folded
from ..store.store import Store, is_begun
from ..terminal.progress import Progress

# wait: told whom one waits for while another process begins or completes the store; None: that is an error


def is_done(path: Path) -> bool:
    """Whether the store is complete, and no claims of the dead are left to be cleared away."""
    is_claimed = any(map(is_claimed_or_left, (store_claim(path), store_claims(path))))
    return is_begun(path) and is_folded(path) and not is_claimed


def begin_once(path: Path, begin: Callable[[], None], require_same: Callable[[Store], None], wait: Callable | None) -> bool:
    """Begin the store unless it was begun, perhaps by another process that is at it; returns whether this one did.

    require_same: raises for a store that another process began meanwhile, if it is not the one asked for.
    """
    if is_begun(path):
        return False
    with claimed(store_claim(path), f"The store {path}", wait):
        if is_begun(path):
            require_same(Store.open(path))
            return False
        begin()
        return True


def complete(store: Store, wait: Callable | None) -> bool:
    """Declare the store complete if no shard is missing; returns whether it was not before and is now."""
    with claimed(store_claim(store.path), f"The store {store.path}", wait):
        store.require_unchanged()
        if store.missing_shards():
            return False
        was_complete = store.is_complete
        fold(store)
        failures.forget(store.path)
        return not was_complete


@contextmanager
def loss_explained(path: Path) -> Iterator[None]:
    """Say so if a store goes away under the hands of its writer."""
    try:
        yield
    except (OSError, NotInCacheError, ClaimLostError) as error:
        gone = next((folder for folder in (path.parent.parent, path.parent, path) if not folder.exists()), None)
        if gone is None:
            raise
        raise NotInCacheError(
            f"{gone} was deleted or moved while the teacher's targets were being written to it. Put it back, or begin it anew; "
            "then run the same command again."
        ) from error


def cut(rows: range, batch_size: int) -> list[np.ndarray]:
    """Row numbers, `batch_size` at a time."""
    return [np.arange(i, min(i + batch_size, rows.stop)) for i in range(rows.start, rows.stop, batch_size)]


def counted(advance: Progress, report: Callable[[float], None]) -> Callable[[int], None]:
    """`advance`, which then also tells `report` how many of its units a second are done."""

    def count(n: int) -> None:
        advance(n)
        report(advance.n_new / advance.seconds)

    return count
