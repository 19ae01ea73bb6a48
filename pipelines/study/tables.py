"""The page of a study, from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..presets import recipe
from .cells import CODES, CURVE, KINDS, METHODS, SWITCHES, VIEWS, Cell, cells_of
from .records import accuracy
from .statistics import DEVIATIONS, Values, orderings, pooled_deviation, sign

BUDGETS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Gigabytes for a million images."""
MEASURES = {"kNN": "knn", "linear": "linear", "fine-tuned": "finetune"}


@dataclass(frozen=True)
class Found:
    """Records by cell."""

    records: dict[str, dict]

    @property
    def seeds(self) -> list[int]:
        return sorted({0, 1, *(record["cell"]["seed"] for record in self.records.values())})

    def of(self, cell: Cell) -> list[dict]:
        """The records of a cell, whatever its seed."""
        names = [replace(cell, seed=seed).name for seed in self.seeds]
        return [self.records[name] for name in dict.fromkeys(names) if name in self.records]

    def values(self, cell: Cell, measure: str, readout: str = "mean") -> Values | None:
        found = [accuracy(record, measure, readout) for record in self.of(cell)]
        numbers = tuple(value for value in found if value is not None)
        return Values(numbers) if numbers else None

    def mean(self, cell: Cell, of: Callable[[dict], float]) -> float | None:
        found = [of(record) for record in self.of(cell)]
        return sum(found) / len(found) if found else None

    def missing(self) -> list[str]:
        """Names of the cells of all groups that are not there; of seeds 0, 1 and whatever others are."""
        return [cell.name for cell in cells_of("all", self.seeds) if cell.name not in self.records]


def page_of(records: dict[str, dict], picture: str | None) -> str:
    """The page, as Markdown. picture: name of the plot, if there is one."""
    found = Found(records)
    parts = [_head(found), _methods(found), _wall(found), _ablations(found), _views(found, picture), _advice(found), _live(found),
             _supervised(found), _missing(found)]  # fmt: skip
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(found: Found) -> list[str]:
    first = next(iter(found.records.values()))
    scale = first["study"]["scale"]
    commits = sorted({record["commit"] for record in found.records.values()})
    hardware = sorted({f"{r['hardware']['n_cpus']} CPUs ({r['hardware']['cpu']})" + (f", {r['hardware']['gpu']}" if
                       r["hardware"]["gpu"] else "") for r in found.records.values()})  # fmt: skip
    teachers = {kind: record["teacher"] for kind in KINDS for record in found.records.values()
                if record["teacher"] and record["cell"]["kind"] == kind}  # fmt: skip
    lines = [
        "## The study", "",
        "Written by `python -m pipelines.study tables`. Accuracy in per cent, ± one standard deviation over seeds. An ordering "
        f"is claimed where two seeds or more of each are more than {DEVIATIONS:g} pooled deviations of their table apart.", "",
        f"- {scale['n_train'] or 'all'} training and {scale['n_test'] or 'all'} test images, {scale['epochs']} epochs, batch "
        f"{scale['batch_size']}.",
        f"- {'; '.join(hardware)}; commit {', '.join(commits)}.",
    ]  # fmt: skip
    for kind, facts in teachers.items():
        lines.append(f"- Teacher `{kind}`: {facts['plan']['epochs']} epochs of {facts['learned_from']:,} images, "
                     f"{facts['seconds']:.0f} s; kNN of {facts['held_out']:,} held-out training images: "
                     f"{100 * facts['held_out_accuracy']['mean']:.1f}.")  # fmt: skip
    protocols = dict.fromkeys(e["protocol"] for record in found.records.values() for e in record["evaluations"])
    return [*lines, *(f"- Protocol: {protocol}." for protocol in protocols), ""]


def _rows(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    header = list(header)
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header),
            *("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows), ""]  # fmt: skip


def _seconds(found: Found, cell: Cell, what: str) -> str:
    value = found.mean(cell, lambda record: record["seconds"][what])
    return "" if value is None else f"{value:.0f}"


def _grid_of(method: str) -> str:
    backbone = recipe(METHODS[method]).config.backbone
    return " x ".join(map(str, getattr(backbone, "strides", (backbone.stride,))))


def _claims(cells: dict[str, Values], of: str) -> list[str]:
    deviation = pooled_deviation(cells.values())
    if deviation is None:
        return [f"{of}: no ordering is claimed, as no cell has two seeds.", ""]
    lines = orderings(cells) or ["none"]
    return [f"{of}, pooled deviation {100 * deviation:.2f}; orderings: {'; '.join(lines)}.", ""]


def _compared(found: Found, cells: dict[str, Cell], measures=MEASURES) -> list[str]:
    claims = []
    for title, measure in measures.items():
        values = {name: v for name, cell in cells.items() if (v := found.values(cell, measure)) is not None}
        claims += _claims(values, title) if len(values) > 1 else []
    return claims


def _methods(found: Found) -> list[str]:
    cells = {method: Cell(method) for method in METHODS} | {"random": Cell("random"), "teacher": Cell("teacher")}
    rows = [
        [name, _grid_of(name) if name in METHODS else "4", found.values(cell, "knn"), found.values(cell, "knn", "cls"),
         found.values(cell, "linear"), found.values(cell, "finetune"), _seconds(found, cell, "training"),
         _seconds(found, cell, "extraction")]
        for name, cell in cells.items() if found.of(cell)
    ]  # fmt: skip
    header = ["", "strides", "kNN, mean of patches", "kNN, CLS", "linear", "fine-tuned", "training s", "extraction s"]
    students = {name: cell for name, cell in cells.items() if name != "teacher"}
    return ["### Methods at equal epochs", "", *_rows(header, rows), *_compared(found, students)]


def _wall(found: Found) -> list[str]:
    cells = {"mae": Cell("mae")} | {method: Cell(method, wall=True) for method in METHODS if method != "mae"}
    rows = [[name, f"{found.mean(cell, lambda record: record['epochs']):.0f}", found.values(cell, "knn"),
             found.values(cell, "linear"), _seconds(found, cell, "training")]
            for name, cell in cells.items() if found.of(cell)]  # fmt: skip
    claims = _compared(found, cells, {name: MEASURES[name] for name in ("kNN", "linear")})
    return ["### Methods at equal wall time", "", *_rows(["", "epochs", "kNN", "linear", "training s"], rows), *claims]


def _ablations(found: Found) -> list[str]:
    rows, pairs = [], []
    for name, switch in SWITCHES.items():
        other = Cell(switch.method, switch=name, source="live" if name == "raw" else "cache")
        for title, measure in [("kNN", "knn"), ("linear", "linear")]:
            values = [found.values(cell, measure) for cell in (other.base, other)]
            if None not in values:
                pairs.append((switch, title, *values))
    for title in ("kNN", "linear"):
        deviation = pooled_deviation(v for _, of, one, other in pairs if of == title for v in (one, other))
        rows += [[switch.method, switch.question.replace(" | ", " against "), of, one, other, sign(one, other, deviation)]
                 for switch, of, one, other in pairs if of == title]  # fmt: skip
    return [
        "### Ablations, by sign",
        "",
        *_rows(["method", "as it is against otherwise", "", "as it is", "otherwise", "sign"], rows),
    ]


def curve(found: Found) -> dict[tuple[str, int], Cell]:
    """(code, views) -> cell, of those that are on record."""
    cells = {(code, views): Cell(CURVE, views=views, code=code) for code in CODES for views in VIEWS}
    return {key: cell for key, cell in cells.items() if found.of(cell)}


def bytes_an_image(found: Found, cell: Cell) -> float:
    """Of crops and targets, in all views."""
    value = found.mean(cell, lambda record: record["storage"]["bytes"] / _n_images(record))
    assert value is not None
    return value


def _n_images(record: dict) -> float:
    storage = record["storage"]
    return storage["bytes"] / (storage["views"] * (storage["crop_bytes_a_crop"] + storage["target_bytes_a_crop"]))


def _views(found: Found, picture: str | None) -> list[str]:
    cells = curve(found)
    rows = [
        [code, views, f"{found.mean(cell, lambda r: r['storage']['target_bytes_a_crop']):,.0f}",
         f"{bytes_an_image(found, cell):,.0f}", found.values(cell, "knn"), found.values(cell, "linear"),
         _seconds(found, cell, "extraction"), _seconds(found, cell, "training"), _seconds(found, cell, "evaluation")]
        for (code, views), cell in cells.items()
    ]  # fmt: skip
    header = ["code", "views", "target bytes a crop", "bytes an image", "kNN", "linear", "extraction s", "training s",
              "evaluation s"]  # fmt: skip
    named = {f"{code}, {views} views": cell for (code, views), cell in cells.items()}
    claims = _compared(found, named, {name: MEASURES[name] for name in ("kNN", "linear")})
    shown = [f"![Accuracy against bytes an image]({picture})", ""] if picture else []
    return [f"### Views and codes ({CURVE})", "", *shown, *_rows(header, rows), *claims]


def advice(found: Found, measure: str = "knn") -> list[tuple[int, str, int, Values]]:
    """(gigabytes for a million images, code, views, accuracy): the smallest cell within the budget that is not worse than the
    best one within it by what counts as an ordering; budgets within which nothing fits are left out."""
    cells = {key: v for key, cell in curve(found).items() if (v := found.values(cell, measure)) is not None}
    deviation, size = pooled_deviation(cells.values()), {key: bytes_an_image(found, curve(found)[key]) for key in cells}
    lines = []
    for budget in BUDGETS:
        fitting = sorted((key for key in cells if size[key] * 1e6 <= budget * 1e9), key=lambda key: size[key])
        if fitting:
            best = max(fitting, key=lambda key: cells[key].mean)
            as_good = [key for key in fitting if deviation is not None
                       and cells[best].mean - cells[key].mean <= DEVIATIONS * deviation]  # fmt: skip
            code, views = (as_good or [best])[0]
            lines.append((budget, code, views, cells[code, views]))
    return lines


def _advice(found: Found) -> list[str]:
    rows = [[f"{budget} GB", code, views, values] for budget, code, views, values in advice(found)]
    return ["### At a budget: how many views, how many bits", "",
            "For a million images of this size. Of the cells that fit, the smallest that is not worse than the best of them "
            f"by more than {DEVIATIONS:g} pooled standard deviations (kNN).", "",
            *_rows(["budget", "code", "views", "kNN"], rows)]  # fmt: skip


def _live(found: Found) -> list[str]:
    cells = {"4 stored crops, targets int8": Cell(CURVE), "the same crops, teacher live": Cell(CURVE, source="live"),
             "a new crop every epoch, teacher live": Cell(CURVE, source="fresh")}  # fmt: skip
    rows = [[name, found.values(cell, "knn"), found.values(cell, "linear"), _seconds(found, cell, "extraction"),
             _seconds(found, cell, "training")] for name, cell in cells.items() if found.of(cell)]  # fmt: skip
    claims = _compared(found, cells, {name: MEASURES[name] for name in ("kNN", "linear")})
    return ["### Cached against live", "", *_rows(["", "kNN", "linear", "extraction s", "training s"], rows), *claims]


def _supervised(found: Found) -> list[str]:
    cells = {"teacher, self": Cell("teacher"), "its student": Cell(CURVE)}
    cells |= {"teacher, supervised": Cell("teacher", kind="supervised"), "student of that": Cell(CURVE, kind="supervised")}
    rows = [[name, found.values(cell, "knn"), found.values(cell, "linear")] for name, cell in cells.items() if found.of(cell)]
    return [f"### Two teachers ({CURVE})", "", *_rows(["", "kNN", "linear"], rows)]


def _missing(found: Found) -> list[str]:
    names = found.missing()
    return ["### Missing cells", "", f"{len(names)}: {', '.join(f'`{name}`' for name in names)}." if names else "None.", ""]
