"""`teacher-cache report`: from a cache to its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from teacher_cache.cache import Cache, View
from teacher_cache.checking.remake import load_teacher_of
from teacher_cache.errors import NotInCacheError, UsageError
from teacher_cache.store.reader import StoreReader

from ..page import render, require_page, write_page
from . import charts, summary
from .boxes import box_figures
from .examples import Album, fidelity, map_of, neighbours
from .sample import draw_blocks, gather
from .verified import Verified, read_verified, verify_now

SECTIONS = {
    "identity": "Identity", "coverage": "Coverage and sizes", "verified": "Verified", "fidelity": "Fidelity", "layers": "Layers",
    "attention": "Attention", "boxes": "Crop boxes", "neighbours": "Neighbours", "map": "Map",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a page is made of besides its cache."""

    view: int = 0
    teacher: str | None = None
    """The store whose tokens are looked at; None: the only one."""
    rows: int = 2000
    """Size of the sample of tokens."""
    seed: int = 0
    verify: bool = False
    sample: int | None = None
    """Rows that verify checks; None: all."""
    verified: Path | None = None
    """Output of verify --json."""
    weights: str | None = None
    """Of the teacher, to measure errors with."""

    def __post_init__(self) -> None:
        if self.verify and self.verified:
            raise UsageError("--verify checks now, --verified reads what was found before: give one of them.")
        if self.sample is not None and not self.verify:
            raise UsageError("--sample says how many rows --verify checks: give both.")


def report(cache_dir: Path, out: Path, options: Options, say: Callable[[str], None]) -> int:
    """Write the page of a cache; returns its bytes. say: called with what takes its time."""
    require_page(out, outside_of=cache_dir)
    cache = Cache(cache_dir)
    verified = read_verified(options.verified, cache) if options.verified else None
    view = cache.finished_view(options.view)
    store = view.targets(options.teacher)
    if not store.finished.any():
        raise NotInCacheError(f"{store.path} has no finished shard yet. Its extraction has to come further first.")
    teacher = load_teacher_of(cache, options.weights, store.path.stem)[1] if options.weights else None

    now = datetime.now(UTC).isoformat(timespec="seconds")
    if options.verify:
        verified = verify_now(cache, options.sample, now)
    return write_page(out, page_of(view, store, options, teacher, verified, now, say))


def page_of(view: View, store: StoreReader, options: Options, teacher, verified: Verified | None, now: str,
            say: Callable[[str], None]) -> str:  # fmt: skip
    """The page as HTML. teacher: to measure errors with, or None. now: ISO 8601."""
    cache, album = view.cache, Album(view)
    gathered = gather(store, draw_blocks(store, options.rows, options.seed))
    shown = fidelity(view, store, gathered, album, teacher, options.seed)
    say("finding neighbours, drawing the map")
    layers, attention, boxes = gathered.layers, gathered.attention, box_figures(album.reader.crops, cache.plan)
    return render(
        "cache_report.html",
        name=cache.path.resolve().name,
        now=now,
        version=version("teacher-cache"),
        sections={id: heading for id, heading in SECTIONS.items() if attention or id != "attention"},
        options=options,
        store_name=store.path.stem,
        dim=store.teacher.dim,
        identity=summary.identity(cache),
        provenance=summary.provenance(store),
        stores=summary.stores(cache),
        sizes=summary.sizes(view, store),
        verified=verified,
        fidelity=shown,
        gathered=gathered,
        charts={"norms": charts.norm_chart(layers), "rank": charts.rank_chart(layers), "likeness": charts.likeness_chart(layers)},
        attention_source=store.teacher.attention_source,
        attention_charts=charts.attention_charts(attention, store.teacher.grid) if attention else [],
        boxes=boxes,
        box_charts=charts.box_charts(boxes, cache.plan),
        neighbours=neighbours(gathered, album, options.seed),
        map=map_of(gathered, album, options.seed),
    )
