"""How far a cache is, who works on it and what failed: from names and small files alone, by any number of watchers.

Nothing is written and nothing is claimed, so that no worker notices. What a worker says of itself stands in its claim
(files/claim_file.py); what went wrong, beside the claims (store/failures.py).
"""

from __future__ import annotations

from pathlib import Path

from ..cache import Cache, View
from ..errors import CacheCorruptError
from ..files.claim_file import Found
from ..files.claims import Observer, extent_of
from ..files.durable import read_sealed
from ..files.range_claims import claims_in
from ..format import layout
from ..format.layout import CACHE_JSON, CROPS_CLAIM, WORK, store_claim, store_claims, store_name, view_number
from ..sharing.blocks import TRIES, Look, runs
from ..store import failures

MOST_ERROR = 300
"""Characters of an error that are shown."""


class Watcher:
    """Looks at the cache in `path`, perhaps again and again: who moves its claim between two looks is seen to live."""

    def __init__(self, path: Path):
        self.path, self._observer = path, Observer()

    def look(self) -> dict:
        """Everything `teacher-cache status` says, as plain JSON values. Raises as Cache does where there is nothing to see."""
        has_work = (self.path / WORK).exists()
        cache = Cache(self.path) if (self.path / CACHE_JSON).exists() or not has_work else None
        crops = self._crops(cache)
        views = [] if cache is None else [self._view(view) for view in cache.views()]
        stores = [store for view in views for store in view["stores"]]
        n_missing = sum(store["rows"] - store["rows_made"] for store in stores)
        rate = sum(store["rate"] for store in stores)
        is_done = crops["is_done"] and all(store["is_complete"] for store in stores)
        return {"path": str(self.path), "crops": crops, "views": views, "rate": rate, "left_s": _left_s(n_missing, rate),
                "is_done": is_done}  # fmt: skip

    def _crops(self, cache: Cache | None) -> dict:
        """The crop stage: images, parts made and to make of each view in work, and who is at it."""
        workers = [_worker(*seen) for seen in self._observer.look(self.path / CROPS_CLAIM)]
        job = _job(self.path / WORK)
        if job is None:
            return {"is_done": True, "images": cache.n_images if cache else 0, "views": {}, "workers": workers}
        n_images, part_rows = job
        views = {
            str(view_number(folder.name)): [len(list(folder.glob(layout.RECORDS))), -(-n_images // part_rows)]
            for folder in sorted((self.path / WORK).glob(layout.VIEWS))
        }
        return {"is_done": False, "images": n_images, "views": views, "workers": workers}

    def _view(self, view: View) -> dict:
        begun = set(view.store_names())
        claims = [path.with_suffix("").name for path in view.path.glob(f"*{layout.STORE_SUFFIX}{layout.CLAIM_SUFFIX}")]
        names = sorted(begun | {store_name(folder) for folder in claims})
        return {"view": view.number, "stores": [self._store(view, name, name in begun) for name in names]}

    def _store(self, view: View, name: str, is_begun: bool) -> dict:
        path = view.store_path(name)
        beginning = [_worker(*seen) for seen in self._observer.look(store_claim(path))]
        if not is_begun:  # its quantiser is being fitted
            return {"name": name, "is_begun": False, "is_complete": False, "shards": None, "made": 0, "in_work": 0, "free": None,
                    "rows": view.cache.n_images, "rows_made": 0, "rate": 0.0, "left_s": None, "claimed_by": beginning,
                    "workers": [], "failed": []}  # fmt: skip
        store = view.store(name)
        claims = [seen for claim in claims_in(store_claims(path)) for seen in self._observer.look(claim)]
        workers = [{**_worker(*seen), "shards": _extent(seen[0], store.spec.n_shards)} for seen in claims]
        missing, failed = store.unfinished(), failures.read(path)
        counted = failures.by_shard(failed)
        look = Look(tuple(missing), tuple(range(*worker["shards"]) for worker in workers), counted)
        n_missing_rows = sum(len(store.spec.rows_of(shard)) for shard in missing)
        rate = sum(worker["rate"] or 0.0 for worker in workers)
        return {
            "name": name, "is_begun": True, "is_complete": store.is_complete, "shards": store.spec.n_shards,
            "made": store.spec.n_shards - len(missing), "in_work": len(look.in_work), "free": len(look.free),
            "rows": store.spec.n_rows, "rows_made": store.spec.n_rows - n_missing_rows, "rate": rate,
            "left_s": _left_s(n_missing_rows, rate), "claimed_by": beginning, "workers": workers,
            "failed": [_failed(last, len(counted.get(last.shard, ())), look) for last in {f.shard: f for f in failed}.values()],
            "left": [[run.start, run.stop] for run in runs(look.left)],
        }  # fmt: skip


def _extent(found: Found, n_shards: int) -> list[int]:
    first, stop = extent_of(found.path)
    return [min(first, n_shards), min(stop, n_shards)]


def _worker(found: Found, is_seen: bool) -> dict:
    """Who holds a claim. is_seen: whether it was seen to live; else it is elsewhere, and may be gone."""
    told = found.holder or {}
    return {"host": _line(told.get("host")), "pid": told.get("pid"), "since": _line(told.get("since")), "rate": _rate(told),
            "is_seen": is_seen}  # fmt: skip


def _rate(told: dict) -> float | None:
    """Crops a second; None before the first of them, and from versions that do not say."""
    try:
        rate = float(told["rate"])
    except (KeyError, TypeError, ValueError):
        return None
    return rate if 0 < rate < float("inf") else None


def _failed(last: failures.Failure, times: int, look: Look) -> dict:
    return {"shards": [last.shard, last.shard + 1], "times": times, "tries": TRIES, "is_left": last.shard in look.left,
            "error": _line(last.error), "host": _line(last.host), "pid": last.pid, "at": _line(last.at)}  # fmt: skip


def _line(text: object) -> str | None:
    """Words that somebody else has written, for a terminal: in one line, and without anything it would obey."""
    if text is None:
        return None
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[:MOST_ERROR]


def _left_s(n_rows: int, rate: float) -> float | None:
    """Seconds; None if nothing says how fast it goes."""
    return 0.0 if n_rows == 0 else n_rows / rate if rate else None


def _job(work: Path) -> tuple[int, int] | None:
    """Images, and images a part, of an unfinished crop stage; None if there is none. CacheCorruptError if job.json is damaged."""
    path = work / layout.JOB_JSON
    try:
        job = read_sealed(path)
    except FileNotFoundError:
        return None
    n_images, part_rows = job.get("n_images"), job.get("part_rows")
    if type(n_images) is not int or type(part_rows) is not int or part_rows < 1:
        raise CacheCorruptError(f"{path}: does not say how many images there are. Delete {work} to start over.")
    return n_images, part_rows
