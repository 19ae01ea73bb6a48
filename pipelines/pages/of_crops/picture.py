"""The picture of one crop, and the sheet of several: pixels, attention, maps of the tokens, masks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.spec import ATTENTION_SOURCES, TeacherSpec

from ..maps import NOTHING, colours_of_tokens, hide, over_crop, similarities
from ..palette import LIGHT
from .crops import LookedAt, box_of
from .laws import Law
from .panels import MARGIN, SIDE, Panels, frame

MOST_COLUMNS = 6
"""Panels side by side in the picture of one crop."""
SHEET_LAYERS = 3
"""Layers on a sheet, evenly spaced."""


@dataclass(frozen=True)
class Scene:
    """What is drawn, and what all crops of it have in common."""

    crops: Sequence[LookedAt]
    teacher: TeacherSpec
    plan: CropPlan
    view: int
    laws: Sequence[Law]
    hidden: Sequence[np.ndarray]
    """bool [n_crops, N] for each law."""
    patch: int | None = None
    """The patch that others are compared with; None: of each crop the most attended that is kept, or the middle one."""

    def patch_of(self, crop: LookedAt) -> int:
        if self.patch is not None:
            return self.patch
        rows, columns = self.teacher.grid
        return (
            rows // 2 * columns + columns // 2
            if crop.attention is None
            else int(np.where(crop.is_kept, crop.attention, -1).argmax())
        )


def picture_of_one(scene: Scene) -> Panels:
    """All layers and all laws of the one crop of a scene."""
    (crop,) = scene.crops
    n_columns = max(4, min(MOST_COLUMNS, max(len(crop.tokens), len(scene.laws))))
    n_lines, n_law_lines = -(-len(crop.tokens) // n_columns), -(-len(scene.laws) // n_columns)
    tops = [1.28]
    for n_next, gap, gap_inside in ((n_lines, 0.66, 0.3), (n_lines, 0.66, 0.3), (n_law_lines, 0.66, 0.42)):
        tops += [tops[-1] + SIDE + gap + i * (SIDE + gap_inside) for i in range(n_next)]
    panels = Panels(tops, n_columns, height=tops[-1] + SIDE + 0.42)

    panels.words(MARGIN, 0.2, f"Row {crop.row:,} of view {scene.view}: {crop.name}", weight="bold", size=13)
    panels.words(MARGIN, 0.47, f"{_class_of(crop)}{_cut_of(scene.plan, crop)}", size=9, color=LIGHT["muted"])

    panels.heading(0, "Crop", f"as {scene.teacher.name} saw it{_attention_in_words(crop, scene.teacher)}")
    _draw_pixels(panels, 0, scene, crop, with_titles=True)

    patch = scene.patch_of(crop)
    row, column = divmod(patch, scene.teacher.grid[1])
    panels.heading(1, "Patch tokens", "the first three principal components of each layer as red, green and blue")
    most = "" if scene.patch is not None or crop.attention is None else ", the most attended"
    panels.heading(1 + n_lines, "Likeness", f"cosine with the patch at row {row}, column {column}{most}; yellow is 1")
    for i, (layer, tokens) in enumerate(crop.tokens.items()):
        line, column = divmod(i, n_columns)
        colours, share = colours_of_tokens(tokens[None])
        panels.panel(1 + line, column, _on_grid(colours[0], scene), f"layer {layer}, {share:.0%} of variance")
        _draw_likeness(panels, 1 + n_lines + line, column, scene, tokens, patch, f"layer {layer}")

    if scene.laws:
        scaled = "; * scaled to this grid" * any(law.scaled for law in scene.laws)
        panels.heading(1 + 2 * n_lines, "Masks", f"what a student would see: one draw of each law of the presets{scaled}")
    for i, (law, hidden) in enumerate(zip(scene.laws, scene.hidden, strict=True)):
        line, column = divmod(i, n_columns)
        masked = hide(crop.pixels, hidden[0], scene.teacher.grid)
        panels.panel(1 + 2 * n_lines + line, column, masked, law.title, below=_presets_of(law))
    return panels


def sheet_layers(stored: Sequence[int]) -> list[int]:
    """The layers that a sheet has room for: the first and the last stored, and some between."""
    return [stored[i] for i in np.unique(np.linspace(0, len(stored) - 1, SHEET_LAYERS).round().astype(int))]


def sheet(scene: Scene) -> Panels:
    """A line for each crop of a scene: pixels, attention, the layers that were read, likeness in the last of them, masks."""
    layers = list(scene.crops[0].tokens)
    n_pixels = _n_pixel_panels(scene.crops[0])
    tops = [0.98 + line * (SIDE + 0.1) for line in range(len(scene.crops))]
    panels = Panels(tops, n_pixels + len(layers) + 1 + len(scene.laws), height=tops[-1] + SIDE + MARGIN, left=1.3)

    rows = f"{len(scene.crops)} crops of view {scene.view}"
    end = panels.words(MARGIN, 0.2, f"{rows} with {scene.teacher.name}", weight="bold", size=13)
    about = "Colours of a layer mean the same in all crops; likeness is the cosine with the framed patch"
    about += "; * scaled to this grid." if any(law.scaled for law in scene.laws) else "."
    panels.words(end + 0.2, 0.25, about, size=9, color=LIGHT["muted"])

    colours = {layer: colours_of_tokens(np.stack([crop.tokens[layer] for crop in scene.crops]))[0] for layer in layers}
    for line, crop in enumerate(scene.crops):
        is_first = line == 0
        panels.words(MARGIN, tops[line], f"row {crop.row:,}", weight="bold", size=9)
        about = textwrap.fill(_class_of(crop).removesuffix(", "), 14) + "\nmirrored" * bool(crop.record["flip"])
        panels.words(MARGIN, tops[line] + 0.2, about.strip(), color=LIGHT["muted"])
        _draw_pixels(panels, line, scene, crop, with_titles=is_first)
        for column, layer in enumerate(layers, start=n_pixels):
            panels.panel(line, column, _on_grid(colours[layer][line], scene), f"layer {layer}" * is_first)
        column = n_pixels + len(layers)
        title = f"likeness, layer {layers[-1]}" * is_first
        _draw_likeness(panels, line, column, scene, crop.tokens[layers[-1]], scene.patch_of(crop), title, with_range=False)
        for law, hidden in zip(scene.laws, scene.hidden, strict=True):
            column += 1
            masked = hide(crop.pixels, hidden[line], scene.teacher.grid)
            panels.panel(line, column, masked, f"{law.title}{' *' * law.scaled}" * is_first)
    return panels


def _n_pixel_panels(crop: LookedAt) -> int:
    return 1 + (crop.original is not None) + (crop.attention is not None)


def _draw_pixels(panels: Panels, line: int, scene: Scene, crop: LookedAt, with_titles: bool) -> None:
    """The original with the box, if it is at hand; the crop; attention over it, if there is some."""
    column = 0
    if crop.original is not None:
        axes = panels.panel(line, column, crop.original, "original and box" * with_titles)
        scale = crop.original.width / int(crop.record["image_width"])
        frame(axes, *(scale * side for side in box_of(scene.plan, crop.record)), colour=LIGHT["accent"])
        axes.set_frame_on(False)
        axes.set_anchor("NW")
        column += 1
    panels.panel(line, column, crop.pixels, "crop" * with_titles)
    if crop.attention is not None:
        levels = crop.attention / max(float(crop.attention.max()), 1e-12)
        title = f"{ATTENTION_SOURCES[scene.teacher.attention_source]} attention"
        axes = panels.panel(line, column + 1, over_crop(crop.pixels, levels, scene.teacher.grid), title * with_titles)
        _frame_patch(axes, scene.patch_of(crop), scene.teacher.grid, *crop.pixels.shape[:2])


def _draw_likeness(panels: Panels, line: int, column: int, scene: Scene, tokens, patch: int, title: str, with_range=True) -> None:
    alike = similarities(tokens, patch)
    low = np.nanmin(alike)
    title += f", {low:.2f} to 1" * with_range
    axes = panels.panel(line, column, _on_grid(alike, scene), title, cmap="viridis", vmin=low, vmax=1)
    axes.set_facecolor([level / 255 for level in NOTHING])
    _frame_patch(axes, patch, scene.teacher.grid, *scene.teacher.grid)


def _frame_patch(axes, patch: int, grid: tuple[int, int], height: int, width: int) -> None:
    """A frame around one patch of a panel of `height` x `width` pixels."""
    row, column = divmod(patch, grid[1])
    frame(axes, column * width / grid[1], row * height / grid[0], width / grid[1], height / grid[0], colour="black")


def _on_grid(values: np.ndarray, scene: Scene) -> np.ndarray:
    """[N, ...] -> [rows, columns, ...]."""
    return values.reshape(*scene.teacher.grid, *values.shape[1:])


def _class_of(crop: LookedAt) -> str:
    return f"class {crop.class_name}, " if crop.class_name else ""


def _cut_of(plan: CropPlan, crop: LookedAt) -> str:
    """Where on the original a crop was cut, in words."""
    left, top, width, height = (round(side) for side in box_of(plan, crop.record))
    jitter = ", ".join(f"{name} x {factor:.2f}" for name, factor in zip(("brightness", "contrast", "saturation"),
                       crop.record["jitter"], strict=True) if factor != 1)  # fmt: skip
    return (
        f"cut from {crop.record['image_width']} x {crop.record['image_height']} px at left {left}, top {top}, "
        f"{width} x {height} px{', mirrored' * bool(crop.record['flip'])}{f', {jitter}' if jitter else ''}"
    )


def _attention_in_words(crop: LookedAt, teacher: TeacherSpec) -> str:
    if crop.attention is None:
        return "; it keeps no attention"
    who = "CLS" if teacher.attention_source == "cls" else "the pooling head"
    return f"; {who} gives the patches {crop.attention.sum():.0%} of its attention, the most attended {crop.attention.max():.1%}"


def _presets_of(law: Law) -> str:
    """The methods behind a law in a line or two below its panel."""
    if len(law.presets) == 1:
        return law.presets[0] + " *" * law.scaled
    return "\n".join(textwrap.wrap(", ".join(law.methods) + " *" * law.scaled, 30))
