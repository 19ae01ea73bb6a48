"""The cells of the study, as one table: what is trained, from what, and in which order. docs/study.md says why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from teacher_cache.errors import UsageError

from ..presets import recipe

METHODS = {
    "mae": "mae-demo", "mr-mae": "mr-mae-demo", "mr-mcmae": "mr-mcmae-demo", "mimco": "mimco-demo", "cae-v2": "cae-v2-demo",
    "maskalign": "maskalign-demo", "milan": "milan-demo",
}  # fmt: skip
"""Method -> its preset, in the architecture and with the training settings of `make demo`."""
REFERENCES = ("teacher", "random")
KINDS = ("self", "supervised")
"""Of the teacher: see pretrain.py."""


@dataclass(frozen=True)
class Switch:
    """An ablation: one setting of a method turned the other way."""

    method: str
    question: str
    """What the method does | what is done instead."""
    overrides: tuple[str, ...]
    """Of student-train --set."""


SWITCHES = {
    "random-masks": Switch("maskalign", "attentive masks | random ones", ("mask.kind=random",)),
    "one-level": Switch("maskalign", "5 levels | 1", ("objectives.0.levels=1",)),
    "layer-wise": Switch("maskalign", "dynamic alignment | layer-wise", ("objectives.0.mixing=layer-wise",)),
    "visible-loss": Switch("cae-v2", "loss of visible and hidden tokens | of visible ones alone", ("objectives.0.tokens=1,1,0",)),
    "no-fusion": Switch("mr-mae", "blocks fused | the last block alone", ("backbone.fuse_blocks=",)),
    "raw": Switch("maskalign", "whitened targets | raw ones, which need --live", ()),
}
N_VISIBLE = recipe("maskalign-demo").config.mask.n_keep(recipe("maskalign-demo").config.backbone)
CODES = ("float16", "int8", "int4", "klt:3", "klt:2", "klt:1.25", f"visible:{N_VISIBLE}")
"""What a store may keep: a dtype of `teacher-cache extract`, or `visible:K` of its --tokens, as int8."""
VIEWS = (1, 2, 4, 8)
MAIN_VIEWS, MAIN_CODE, CURVE = 4, "int8", "maskalign"
"""Where the groups meet; and the method of the curve, of the ablations and of the comparison with live teachers."""


@dataclass(frozen=True)
class Cell:
    """One student, or one of REFERENCES; equal values are the same run whichever group asks for it."""

    method: str
    seed: int = 0
    views: int = MAIN_VIEWS
    """Crops of each image that are stored; with `fresh` there is a new one in every epoch."""
    code: str = MAIN_CODE
    kind: str = "self"
    source: str = "cache"
    """cache; live: the teacher runs on the stored crops; fresh: on a new crop in every epoch."""
    switch: str = ""
    wall: bool = False
    """Whether it has the wall time of MAE's cell instead of its epochs."""

    @property
    def preset(self) -> str:
        return METHODS[self.method]

    @property
    def needs_teacher(self) -> bool:
        return self.method not in ("mae", "random")

    @property
    def base(self) -> Cell:
        """The cell that an ablation, or one of equal wall time, is compared with."""
        return replace(self, switch="", wall=False, source="cache" if self.switch else self.source)

    @property
    def name(self) -> str:
        """Of the cell's folders and record."""
        if self.method in REFERENCES:
            return self.method + f"-{self.kind}" * (self.method == "teacher") + f"-s{self.seed}" * (self.method == "random")
        taught = [self.kind] if self.needs_teacher else []
        where = ["fresh"] if self.source == "fresh" else [f"v{self.views}"]
        if self.source != "fresh" and self.needs_teacher:
            where.append("live" if self.source == "live" else self.code.replace(":", ""))
        return "-".join(
            [self.method, *taught, *where, *([self.switch] if self.switch else []), *["wall"] * self.wall, f"s{self.seed}"]
        )


def _methods(seeds: Sequence[int]) -> list[Cell]:
    """Part 1: seed after seed, the references of a seed behind its students; wall time, of the first seed, last."""
    cells: list[Cell] = []
    for seed in seeds:
        cells += [Cell(method, seed) for method in METHODS] + [Cell("random", seed)]
        cells += [Cell("teacher", kind="self")] if seed == seeds[0] else []
    cells += [Cell(method, seeds[0], wall=True) for method in METHODS if method != "mae"]
    return cells


def _supervised(seeds: Sequence[int]) -> list[Cell]:
    """The same curve's main point under the teacher that has seen the classes."""
    return [Cell("teacher", kind="supervised"), *(Cell(CURVE, seed, kind="supervised") for seed in seeds)]


def _views(seeds: Sequence[int]) -> list[Cell]:
    """Part 3, the corner that is promised: {1, 4} views of three codes."""
    codes = (MAIN_CODE, "klt:3", "klt:1.25")
    return [Cell(CURVE, seed, views, code) for seed in seeds for code in codes for views in (4, 1)]


def _other_views(seeds: Sequence[int]) -> list[Cell]:
    """Part 3, the rest: both axes through the main point first, then what lies between."""
    axes = [(views, MAIN_CODE) for views in VIEWS] + [(MAIN_VIEWS, code) for code in CODES]
    between = [(views, code) for code in CODES for views in VIEWS]
    order = list(dict.fromkeys([*axes, *between]))
    return [Cell(CURVE, seed, views, code) for views, code in order for seed in seeds]


def _live(seeds: Sequence[int]) -> list[Cell]:
    """Part 4: a new crop in every epoch, and the stored crops, both with the teacher on the spot."""
    return [Cell(CURVE, seed, source=source) for source in ("fresh", "live") for seed in seeds]


def _ablations(seeds: Sequence[int]) -> list[Cell]:
    """Part 2."""
    return [Cell(switch.method, seed, switch=name, source="live" if name == "raw" else "cache")
            for name, switch in SWITCHES.items() for seed in seeds]  # fmt: skip


GROUPS = {
    "methods": (_methods,),
    "views": (_views, _other_views),
    "live": (_live,),
    "ablations": (_ablations,),
    "supervised": (_supervised,),
    "all": (_methods, _views, _live, _ablations, _supervised, _other_views),
}
"""Of --cells; `all` in the order in which cells matter."""


def cells_of(group: str, seeds: Sequence[int]) -> list[Cell]:
    """The cells of a group in their order, each once. UsageError for a name that is none, or no seeds."""
    if group not in GROUPS:
        raise UsageError(f"--cells {group}: there are {', '.join(GROUPS)}.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds: give whole numbers from 0, each once, as 0,1; not {','.join(map(str, seeds)) or 'nothing'}.")
    return list(dict.fromkeys(cell for part in GROUPS[group] for cell in part(seeds)))


def overrides(cell: Cell, epochs: int, batch_size: int) -> list[str]:
    """What `student-train --set` is given for a cell."""
    changes = [f"seed={cell.seed}", f"epochs={epochs}", f"batch_size={batch_size}"]
    changes += [f"optim.warmup_epochs={min(1.0, epochs / 2):g}"]
    return changes + list(SWITCHES[cell.switch].overrides if cell.switch else ())


NEAR = 0.15
"""A method whose wall time differs from MAE's by less than this share has had it already, in its cell of equal epochs."""


def wall_epochs(epochs: int, seconds: float, seconds_of_mae: float) -> int:
    """Epochs that take as long as MAE's, for a method that takes `seconds` for `epochs`; at least 1, and `epochs` if NEAR."""
    if not (0 < seconds < math.inf and 0 < seconds_of_mae < math.inf):
        raise UsageError(f"No epochs take {seconds_of_mae:g} s where {epochs} take {seconds:g} s.")
    if abs(seconds / seconds_of_mae - 1) < NEAR:
        return epochs
    return max(1, round(epochs * seconds_of_mae / seconds))
