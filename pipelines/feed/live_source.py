"""Batches of crops with targets that teachers compute on the spot.

On the very crops and with the very preprocessing that extraction uses: the oracle of the tests, and the baseline of every speed
claim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from student.batch import Needs, Targets, TeacherHead
from teacher_cache.cache import Cache
from teacher_cache.errors import UsageError

from .crop_source import CropSource
from .loader import RawBatch
from .teacher_values import block_numbers, teacher_head


class LiveSource(CropSource):
    """The same crops in the same order, their targets computed by the teachers on the spot.

    teachers: teacher_cache.teachers.base.Teacher, on the source's device; needs: of each of them.
    """

    def __init__(self, cache: Cache, teachers: Sequence, needs: Sequence[Needs], **options):
        super().__init__(cache, **options)
        self.teachers, self.needs = list(teachers), list(needs)
        for teacher in self.teachers:
            if teacher.device.type != self.device.type:
                raise UsageError(f"The teacher is on {teacher.device}, the student on {self.device}.")
        self.identity["teachers"] = [
            {"live": teacher.spec.name, "weights_sha256": teacher.spec.weights_sha256} | ({"raw": True} if teacher.is_raw else {})
            for teacher in self.teachers
        ]
        self.heads = [teacher_head(teacher.head, self.device) for teacher in self.teachers]

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        return tuple(
            self._targets_of(teacher, needs, head, raw.images)
            for teacher, needs, head in zip(self.teachers, self.needs, self.heads, strict=True)
        )

    @staticmethod
    def _targets_of(teacher, needs: Needs, head: TeacherHead | None, images_u8: Tensor) -> Targets:
        layers = block_numbers(needs, teacher.spec)
        output = teacher(images_u8, layers or [teacher.spec.depth])
        attention = output.attention if needs.attention else None
        return Targets(output.tokens[:, : len(layers)], needs.layers, teacher.spec.has_cls, attention, head)
