"""A teacher as the disk describes it, in the words of a student: its shape, its head, its blocks."""

from __future__ import annotations

import numpy as np
import torch

from student.batch import Needs, TeacherHead, TeacherShape
from teacher_cache.cache import Cache
from teacher_cache.format.spec import TeacherSpec


def teacher_shape(spec: TeacherSpec, n_visible: int | None = None) -> TeacherShape:
    """What a student must know of its teacher. n_visible: patch tokens that a store keeps of it, None if all."""
    return TeacherShape(
        spec.name, spec.grid, spec.dim, spec.depth, spec.has_cls, spec.attention_source is not None, spec.projection_dim,
        n_visible, spec.has_final_norm, spec.patch_size,
    )  # fmt: skip


def stored_shape(cache: Cache, store_name: str) -> TeacherShape:
    """`teacher_shape` of the teacher behind a store of view 0."""
    store = cache.finished_view(0).store(store_name)
    return teacher_shape(store.teacher, store.spec.visible or None)


def teacher_head(arrays: dict[str, np.ndarray], device: torch.device) -> TeacherHead | None:
    """Final norm and projection, as a store or a teacher keeps them, on the device; None where there is no final norm."""
    if not arrays:
        return None
    tensors = {name: torch.from_numpy(np.array(values)).to(device) for name, values in arrays.items()}
    return TeacherHead(tensors["gamma"], tensors["beta"], tensors.get("projection"))


def block_numbers(needs: Needs, teacher: TeacherSpec) -> list[int]:
    """The layers a student needs, counted from its teacher's last block, as block numbers from 1."""
    return [teacher.depth + 1 + offset for offset in needs.layers]
