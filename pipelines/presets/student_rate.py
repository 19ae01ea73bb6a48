"""What a preset's student reads of its teacher, and how fast it trains when it never waits for data."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from student.batch import Batch, Needs, Targets, TeacherHead, TeacherShape
from student.config import TrainConfig
from student.errors import ConfigError
from student.masking import draw_noise
from student.modules.model import Student
from student.run.optim import build_optimizer
from teacher_cache.errors import UsageError
from teacher_cache.format.spec import TeacherSpec

from ..feed.teacher_values import block_numbers, teacher_shape

LASTS_S = 8.0
LEAST_STEPS = 2
MOST_CROPS = {"cpu": 32, "cuda": 256}
"""A batch of the trial; the rate of larger ones is no lower."""


def student_of(config: TrainConfig, teacher: TeacherSpec, n_visible: int | None = None) -> Student:
    """The preset's student under this teacher, in the place of each of its own. UsageError if they do not fit.

    n_visible: patch tokens that the store keeps; None: all.
    """
    try:
        return Student(config, (teacher_shape(teacher, n_visible),) * len(config.teachers))
    except ConfigError as error:
        raise UsageError(str(error)) from error


def layers_read(student: Student, teacher: TeacherSpec) -> tuple[list[int], bool]:
    """Block numbers of the first teacher that a student reads, and whether its attention."""
    needs = student.needs[0] if student.needs else Needs()
    return block_numbers(needs, teacher), needs.attention


def student_rate(config: TrainConfig, student: Student, teacher: TeacherSpec, device: str) -> tuple[float, int]:
    """Crops a second of forward, backward and update on one batch that lies on the device already; and the batch's crops."""
    kind = torch.device(device).type
    config = replace(config, batch_size=min(config.batch_size, MOST_CROPS[kind]), accumulate=1)
    student.to(device).train()
    optimizer = build_optimizer(student, config.optim)
    batch = _noise_batch(config, student.needs, teacher_shape(teacher), device)

    def step(number: int) -> None:
        mask = student.draw_mask(batch, draw_noise(0, number, config.batch_size, student.n_patches))
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and config.precision != "fp32"):
            loss, _ = student(batch, mask)
        optimizer.zero_grad()
        loss.backward()
        student.after_batch()
        optimizer.step()
        loss.item()  # waits for the device

    step(0)  # the first one prepares much
    n_steps, started = 0, time.perf_counter()
    while n_steps < LEAST_STEPS or time.perf_counter() - started < LASTS_S:
        n_steps += 1
        step(n_steps)
    return n_steps * config.batch_size / (time.perf_counter() - started), config.batch_size


def _noise_batch(config: TrainConfig, needs: tuple[Needs, ...], teacher: TeacherShape, device: str) -> Batch:
    n_crops, n_patches, size = config.batch_size, teacher.grid[0] * teacher.grid[1], config.backbone.image_size
    draws = torch.Generator().manual_seed(0)

    def targets(of: Needs) -> Targets:
        shape = (n_crops, len(of.layers), n_patches + teacher.has_cls, teacher.dim)
        attention = torch.rand(n_crops, n_patches, generator=draws).to(device) / n_patches if of.attention else None
        projection = torch.randn(teacher.dim, teacher.projection_dim, generator=draws) if teacher.projection_dim else None
        head = TeacherHead(torch.ones(teacher.dim, device=device), torch.zeros(teacher.dim, device=device),
                           None if projection is None else projection.to(device))  # fmt: skip
        return Targets(torch.randn(shape, generator=draws).to(device), of.layers, teacher.has_cls, attention, head)

    images = torch.randn(n_crops, 3, size, size, generator=draws).to(device)
    return Batch(images, torch.arange(n_crops), None, tuple(map(targets, needs)))
