"""`python -m pipelines.presets`: the table of docs/presets.md, from the presets themselves."""

from __future__ import annotations

import torch

from student.batch import TeacherShape
from student.modules.model import Student
from teacher_cache.teachers.families import known_teachers

from ..feed.teacher_values import teacher_shape
from . import PRESETS, recipe


def shape_of(name: str, grid: tuple[int, int]) -> TeacherShape:
    """What a student of a grid must know of a teacher of the table, at the image size that gives it this grid."""
    known = known_teachers()[name]
    return teacher_shape(known.spec(grid[0] * known.patch_size))


def line(preset: str) -> str:
    config = recipe(preset).config
    with torch.device("meta"):
        student = Student(config, tuple(shape_of(name, config.backbone.grid) for name in config.teachers))
    encoder, everything = (
        sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        for module in (student.backbone, student)
    )
    reads = [
        f"{name}: last {-needs.layers[0]}{', attention' * needs.attention}"
        for name, needs in zip(config.teachers, student.needs, strict=True)
    ]
    visible, all_ = config.mask.n_keep(config.backbone), config.backbone.n_patches
    losses = ", ".join(objective.name for objective in config.objectives)
    return (
        f"| `{preset}` | {encoder / 1e6:.1f} M | {everything / 1e6:.1f} M | {visible} of {all_}, {config.mask.kind} | {losses} | "
        f"{'; '.join(reads) or 'nothing'} |"
    )


def table() -> str:
    return "\n".join([
        "# Presets",
        "",
        "Written by `python -m pipelines.presets`. Trained parameters of the encoder, and with its heads; visible",
        "patches and how they are drawn; losses; what is read of each teacher (layers counted from its last block).",
        "",
        "| preset | encoder | with heads | visible patches | losses | reads |",
        "|---|---|---|---|---|---|",
        *map(line, PRESETS),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    print(table(), end="")
