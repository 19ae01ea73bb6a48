"""A program as people write it with the public names. It is never run: mypy reads it (`make check`), and a name that has become
Any, or a signature that changed, is an error here."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

from torch import Tensor, nn

from pipelines.presets import recipe
from pipelines.presets.recipe import Recipe
from student import Student, TeacherShape, TrainConfig, ViTConfig, latest_checkpoint, load_backbone
from teacher_cache.cache import Cache, View
from teacher_cache.format.crop_plan import CropPlan


def look(path: Path) -> list[str]:
    cache = Cache(path)
    assert_type(cache.plan, CropPlan)
    assert_type(cache.n_images, int)
    assert_type(cache.views(), list[View])
    return cache.view(0).store_names()


def configure(shape: TeacherShape) -> Student:
    chosen = recipe("maskalign-b16")
    assert_type(chosen, Recipe)
    assert_type(chosen.config, TrainConfig)
    assert_type(ViTConfig(image_size=32, patch_size=4).n_patches, int)
    return Student(chosen.config, (shape,))


def features(run: Path, images: Tensor) -> nn.Module:
    checkpoint = latest_checkpoint(run)
    assert_type(checkpoint, Path | None)
    assert checkpoint is not None
    backbone, config = load_backbone(checkpoint)
    assert_type(config, TrainConfig)
    return backbone
