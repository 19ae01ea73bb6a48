"""A small student and a data source whose every number is a function of a row's index. No files, no teacher."""

from __future__ import annotations

import torch

from student import (
    Batch,
    MaskConfig,
    MimicConfig,
    Needs,
    OptimConfig,
    PredictorConfig,
    ReconstructConfig,
    Targets,
    TeacherHead,
    TeacherShape,
    TrainConfig,
    ViTConfig,
)
from student.devices.micro_batches import number_in_step

TEACHER = TeacherShape("fake", grid=(4, 4), dim=12, depth=3, has_cls=True, has_attention=True, projection_dim=None)


def tiny_config(**changes) -> TrainConfig:
    """16-pixel crops in 4 x 4 patches; 2 epochs; drop path on."""
    values = {
        "preset": "tiny",
        "backbone": ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, drop_path=0.3),
        "mask": MaskConfig("attention", 0.5),
        "objectives": (MimicConfig(0.5), ReconstructConfig(0.5, decoder=PredictorConfig(dim=8, depth=1, heads=2))),
        "optim": OptimConfig(base_lr=0.05, warmup_epochs=0.5),
        "epochs": 2,
        "batch_size": 4,
    }
    return TrainConfig(**{**values, **changes})


def fake_batch(rows: range, layers: tuple[int, ...] = (-2, -1), teacher: TeacherShape = TEACHER) -> Batch:
    """The batch of these rows, each drawn from a generator seeded by its row."""
    n_patches = teacher.grid[0] * teacher.grid[1]
    images, tokens, attention = [], [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row)
        images.append(torch.randn(3, 4 * teacher.grid[0], 4 * teacher.grid[1], generator=generator))
        tokens.append(torch.randn(len(layers), teacher.has_cls + n_patches, teacher.dim, generator=generator))
        attention.append(torch.rand(n_patches, generator=generator).softmax(0))
    head = TeacherHead(torch.ones(teacher.dim), torch.zeros(teacher.dim), None)
    targets = Targets(
        torch.stack(tokens), layers, teacher.has_cls, torch.stack(attention) if teacher.has_attention else None, head
    )
    return Batch(torch.stack(images), torch.tensor(rows), torch.tensor(rows) % 3, (targets,))


class FakeSource:
    """Step k takes rows k * batch_size onward, of which process `rank` of `world` has its slice.

    `before(step, index)` is called before each micro-batch is given.
    """

    def __init__(self, config: TrainConfig, needs: tuple[Needs, ...], steps_per_epoch: int = 5, before=lambda step, index: None,
                 rank: int = 0, world: int = 1, accumulate: int | None = None):  # fmt: skip
        self.config = config
        self.needs = needs
        self.steps_per_epoch = steps_per_epoch
        self.identity = {"cache": "fake", "rows": steps_per_epoch * config.batch_size}
        self.before = before
        self.rank, self.world = rank, world
        self.accumulate = accumulate or config.accumulate
        self.n_closed = 0

    def micro_batches(self, first_step: int, last_step: int):
        size = self.config.batch_size // self.world // self.accumulate
        try:
            for step in range(first_step, last_step):
                for index in range(self.accumulate):
                    self.before(step, index)
                    first_row = step * self.config.batch_size + number_in_step(index, self.rank, self.world) * size
                    yield fake_batch(range(first_row, first_row + size), self.needs[0].layers)
        finally:
            self.n_closed += 1
