"""What `inspect.describe` found, for people: tables on a terminal, the same text in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..format.spec import ATTENTION_SOURCES
from ..words import human, quoted

BAR_CELLS = 32
"""Of the bar of shards, where there is room."""
BESIDE_BAR = 72
"""Columns that the rest of its line takes."""
PIPE_WIDTH = 140
"""Columns where there is no terminal to ask."""
MOST_RANGES = 6
"""Ranges of missing shards that are named."""


def show(cache: dict) -> None:
    """Print a description to stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    full, empty = "█·" if (console.encoding or "").lower().startswith("utf") else "#."
    bar = Bar(max(8, min(BAR_CELLS, console.width - BESIDE_BAR)), full, empty)
    with console.capture() as captured:
        for part in _parts(cache, bar):
            console.print(part)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@dataclass(frozen=True)
class Bar:
    """Which shards are there, at a glance."""

    n_cells: int = BAR_CELLS
    full: str = "█"
    empty: str = "·"

    def of(self, missing: list[list[int]], n_shards: int) -> str:
        """A cell is full if all of its shards are there; with fewer shards than cells, a shard has several."""
        cells = []
        for cell in range(self.n_cells):
            first = cell * n_shards // self.n_cells
            stop = max(first + 1, (cell + 1) * n_shards // self.n_cells)
            cells.append(self.empty if any(start < stop and first < end for start, end in missing) else self.full)
        return "".join(cells)


def _parts(cache: dict, bar: Bar) -> Iterator:
    plan, views = cache["plan"], cache["views"]
    skipped = f", {cache['n_skipped']:,} left out (skipped.txt)" if cache["n_skipped"] else ""
    drawn = ""
    if plan["kind"] == "random":
        drawn = f", scale {plan['scale'][0]:g} to {plan['scale'][1]:g}, flip {plan['flip_p']:g}"
        drawn += f", jitter {plan['jitter']:g}" * bool(plan["jitter"])
    n_bytes = sum(view["crop_bytes"] + sum(store["bytes"] for store in view["stores"]) for view in views)
    yield Text(f"{cache['path']}  (crops {cache['crops_id'][:12]})", "bold", overflow="fold")
    yield _facts([
        ("images", f"{cache['n_images']:,} in {cache['n_classes']:,} classes{skipped}"),
        ("crops", f"{plan['kind']}, {plan['size']} px, {cache['crop_format']}, {plan['resample']}, seed {plan['seed']}{drawn}"),
        ("views", "; ".join(f"view {view['view']}: crops.beton {human(view['crop_bytes'])}" for view in views) or "none"),
        ("on disk", human(n_bytes)),
    ])  # fmt: skip
    for name in sorted({store["name"] for view in views for store in view["stores"]}):
        yield ""
        found = {view["view"]: store for view in views for store in view["stores"] if store["name"] == name}
        yield from _store_parts(name, found, [view["view"] for view in views], bar)
    if cache["left_over"]:
        names = ", ".join(cache["left_over"])
        yield Text(f"left by an interrupted command, which is to be run again: {names}", "yellow", overflow="fold")
    if not any(view["stores"] for view in views):
        yield Text("no targets yet: teacher-cache extract --teacher NAME " + quoted(cache["path"]), overflow="fold")


def _store_parts(name: str, found: dict[int, dict], views: list[int], bar: Bar) -> Iterator:
    """One store in all views; what it keeps is the same in all of them."""
    first = next(iter(found.values()))
    teacher, spec, per_crop = first["teacher"], first["store"], first["bytes_per_crop"]
    on_disk = "nothing yet" if per_crop["on_disk"] is None else f"{human(per_crop['on_disk'])} on disk"
    codecs = "/".join(sorted({codec for _, codec in spec["codecs"]}))
    attention = f", {ATTENTION_SOURCES[teacher['attention_source']]} attention" if spec["attention"] else ", no attention"
    visible = f", {'CLS and ' * teacher['has_cls']}{spec['visible']} patches of each crop" * (spec["visible"] > 0)
    head = ", no final norm" * (teacher["head"] == "none")
    yield _facts([
        (name, f"{teacher['name']}, weights {teacher['weights']} (sha256 {teacher['weights_sha256'][:12]}), "
         f"{teacher['image_size']} px, {first['precision']}"),
        ("keeps", f"layers {', '.join(map(str, spec['layers']))} of {teacher['depth']}, {spec['dtype']}, codec {codecs}"
         + attention + visible + head),
        *_read_with(first),
        ("made with", _made_with(first)),
        ("a crop", f"{human(per_crop['float16'])} as float16 -> {human(per_crop['quantised'])} quantised -> {on_disk}"),
    ], is_title=True)  # fmt: skip

    table = _table("view", "rows", "shards", "on disk", "which shards are there", "")
    for view in views:
        store = found.get(view)
        if store is None:
            table.add_row(str(view), "", "", "", bar.empty * bar.n_cells, Text("not begun", "yellow"))
            continue
        share = store["rows_done"] / store["rows"]
        table.add_row(
            str(view), f"{store['rows_done']:,} of {store['rows']:,} ({_percent(share)})",
            f"{store['shards_done']:,} of {store['shards']:,}", human(store["bytes"]),
            Text(bar.of(store["missing_shards"], store["shards"])), _state(store),
        )  # fmt: skip
    yield Padding(table, (0, 0, 0, 2))

    if first["fidelity"]:
        table = _table("layer", "median", "p99", "worst", "standardised error of a token, by what was stored")
        for layer in first["fidelity"]:
            table.add_row(str(layer["layer"]), *(f"{layer[key]:.2%}" for key in ("median", "p99", "worst")))
            if layer["cls"]:
                table.add_row(f"{layer['layer']} CLS", *(f"{value:.2%}" for value in layer["cls"]))
        yield Padding(table, (0, 0, 0, 2))
    for view, store in found.items():
        if store["finish"]:
            yield Text(f"  to finish view {view}: {store['finish']}", "yellow", overflow="fold")


def _read_with(store: dict) -> list[tuple[str, str]]:
    """What cannot be read apart, of a store that is coded by a transform; and what it was recoded from."""
    lines = [
        f"block {layer} with the codes of {', '.join(map(str, behind))}" if behind else f"block {layer} alone"
        for layer, behind in reversed(store["read_with"].items())
    ]
    facts = [("is read", "; ".join(lines))] if any(store["read_with"].values()) else []
    if source := store["source"]:
        facts.append(("made from", f"the store {source['name']}, {source['dtype']} (sha256 {source['sha256'][:12]})"))
    return facts


def _made_with(store: dict) -> str:
    """What is on record of how a store was begun."""
    versions = ", ".join(f"{name} {version}" for name, version in store["software"].items()) or "software not on record"
    made = store["made"]
    if made is None:
        return f"{versions}; batches, device and torch.compile are not on record"
    return f"batches of {made['batch_size']} on {made['device']}{', torch.compile' * made['compile']}; {versions}"


def _state(store: dict) -> Text:
    in_fp32 = f", {store['fp32_rows']:,} rows in fp32" * (store["fp32_rows"] > 0)
    if store["complete"]:
        return Text(f"complete{in_fp32}", "green")
    missing = [f"{first}:{stop}" for first, stop in store["missing_shards"]]
    if not missing:
        return Text("NOT complete: all shards are there, the last step is missing", "yellow")
    more = f" and {len(missing) - MOST_RANGES} more ranges" if len(missing) > MOST_RANGES else ""
    return Text(f"NOT complete, missing {', '.join(missing[:MOST_RANGES])}{more}{in_fp32}", "yellow")


def _percent(share: float) -> str:
    """Only what is all is 100%."""
    return f"{min(share, 0.99) if share < 1 else 1:.0%}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=bool(column))
    return table


def _facts(pairs: list[tuple[str, str]], is_title: bool = False) -> Table:
    """A term and what is said of it, a line each; the first term is a title."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=9)
    table.add_column(overflow="fold")
    for place, (term, fact) in enumerate(pairs):
        table.add_row(Text(term, "bold" if is_title and place == 0 else "dim"), Text(fact))
    return table
