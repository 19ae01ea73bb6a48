"""Every preset: what it says, that its miniature learns what it should, and that losses stay what they were.

`python tests/test_pipelines_presets.py` writes tests/golden/losses.txt anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.presets import PRESETS, recipe
from pipelines.presets.__main__ import shape_of, table
from student.batch import Batch, Targets, TeacherHead, TeacherShape
from student.config import ContrastConfig, TrainConfig
from student.masking import draw_noise
from student.modules.model import Student
from student.run.optim import build_optimizer
from student.run.rates import learning_rate
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.teachers.families import known_teachers

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"
METHODS = ["mae-b16", "mr-mae-b16", "mr-mcmae-b", "mimco-b16", "mimco-swin-t", "cae-v2-b16", "maskalign-b16", "milan-b16"]


def small_teacher(name: str) -> TeacherShape:
    """A narrow teacher on 4 x 4 patches with what the real one of that name has."""
    known = known_teachers()[name]
    has_attention = known.attention_source is not None
    return TeacherShape(name, (4, 4), 24, 6, known.has_cls, has_attention, 10 if name.startswith("clip") else None)


def batch_of(rows: range, teachers: tuple[TeacherShape, ...], layers: list[tuple[int, ...]]) -> Batch:
    """Crops of 32 x 32 and targets, each a function of its row."""
    images, per_teacher = [], [[] for _ in teachers]
    for row in rows:
        generator = torch.Generator().manual_seed(row)
        images.append(torch.randn(3, 32, 32, generator=generator))
        for index, teacher in enumerate(teachers):
            tokens = torch.randn(len(layers[index]), teacher.has_cls + 16, teacher.dim, generator=generator)
            per_teacher[index].append((tokens, torch.randn(16, generator=generator).mul(2).softmax(0)))
    targets = []
    for index, teacher in enumerate(teachers):
        tokens, attention = (torch.stack(parts) for parts in zip(*per_teacher[index], strict=True))
        generator = torch.Generator().manual_seed(index)
        projection = torch.randn(24, 10, generator=generator) if teacher.projection_dim else None
        head = TeacherHead(1 + 0.1 * torch.randn(24, generator=generator), 0.1 * torch.randn(24, generator=generator), projection)
        targets.append(Targets(tokens, layers[index], teacher.has_cls, attention if teacher.has_attention else None, head))
    return Batch(torch.stack(images), torch.tensor(rows), None, tuple(targets))


def tiny(preset: str) -> tuple[TrainConfig, tuple[TeacherShape, ...]]:
    made = recipe(preset)
    teachers = tuple(small_teacher(name) for name in made.teachers)
    return made.tiny(teachers).config, teachers


def losses_of(config: TrainConfig, teachers: tuple[TeacherShape, ...], n_steps: int, accumulate: int = 1) -> list[float]:
    """Losses of the first steps on rows 0, 1, ..., as the trainer takes them; 5 steps are called an epoch."""
    student = Student(config, teachers).train()
    optimizer = build_optimizer(student, config.optim)
    layers, losses = [needs.layers for needs in student.needs], []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 5, config.epochs, config.batch_size, config.optim)
        optimizer.zero_grad()
        total = 0.0
        size, drops = config.batch_size // accumulate, student.draw_drops(0, step, config.batch_size)
        for index, noise in enumerate(draw_noise(0, step, config.batch_size, student.n_patches).chunk(accumulate)):
            first = step * config.batch_size + index * size
            batch = batch_of(range(first, first + size), teachers, layers)
            own_drops = None if drops is None else drops.chunk(accumulate)[index]
            loss, _ = student(batch, student.draw_mask(batch, noise), own_drops)
            (loss / accumulate).backward()
            student.after_batch()
            total += loss.item() / accumulate
        if config.optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.clip_grad)
        optimizer.step()
        student.after_step(step + 1, n_steps)
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", PRESETS)
def test_what_it_says(name):
    """Every preset is named like its function, and says its command, what is expected of it and where it deviates."""
    made = recipe(name)
    assert made.name == name and made.plan.size == made.config.backbone.image_size
    text = PRESETS[name].__doc__
    assert f"student-train --cache CACHE --preset {name} --out RUN" in text and "Deviations:" in text
    assert name.endswith("-demo") or "Expected:" in text
    assert TrainConfig.from_json(made.config.to_json()) == made.config


@pytest.mark.parametrize("name", PRESETS)
def test_golden_losses(name):
    """10 steps of the miniature give the losses on record, to 1e-4."""
    golden = dict(line.split(maxsplit=1) for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))
    expected = [float(value) for value in golden[name].split()]
    assert losses_of(*tiny(name), n_steps=10) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_every_weight_learns(name):
    """A backward pass reaches every trainable weight of the miniature; a final norm that nothing reads is not trainable."""
    config, teachers = tiny(name)
    student = Student(config, teachers)
    batch = batch_of(range(4), teachers, [needs.layers for needs in student.needs])
    loss, _ = student(batch, student.draw_mask(batch, draw_noise(0, 0, 4, student.n_patches)))
    loss.backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []
    assert student.backbone.norm.weight.requires_grad != name.startswith("maskalign")
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("size, grid", [(224, 16), (224, 7), (32, 8), (32, 32), (49, 7), (30, 6), (30, None)])
@pytest.mark.parametrize("name", METHODS)
def test_tiny_fits_any_grid(name, size, grid):
    """The miniature builds on whatever grid and crop size a cache has, odd strides included, and keeps something visible."""
    made = recipe(name)
    teachers = tuple(replace(small_teacher(teacher), grid=(grid, grid)) for teacher in made.teachers) if grid else ()
    if made.teachers and not teachers:
        pytest.skip("a method with teachers takes the grid of the first")
    config = made.tiny(teachers, size).config
    assert grid is None or not teachers or config.backbone.grid == (grid, grid)
    with torch.device("meta"):
        Student(config, teachers)


@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("mimco")])
def test_accumulation_equals_the_large_batch(name):
    """4 micro-batches a step give the losses of one batch, drop path and all: only MimCo has statistics of the batch."""
    config, teachers = tiny(name)
    large = losses_of(config, teachers, 4)
    assert losses_of(config, teachers, 4, accumulate=4) == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_compiles_whole(name):
    """The forward pass with all losses is one graph for torch.compile, drop path and all, with the same loss."""
    torch._dynamo.reset()
    config, teachers = tiny(name)
    student = Student(config, teachers).train()
    batch = batch_of(range(2), teachers, [needs.layers for needs in student.needs])
    mask = student.draw_mask(batch, draw_noise(0, 0, 2, student.n_patches))
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    for step in (0, 1):  # in the second other branches are dropped, by the same graph
        drops = student.draw_drops(0, step, 2)
        torch.testing.assert_close(compiled(batch, mask, drops)[0], student(batch, mask, drops)[0])


@pytest.mark.large
@pytest.mark.parametrize("name", [n for n in PRESETS if not n.endswith("-demo")])
def test_full_size(name):
    """The full-size student makes one forward and backward pass on random targets of its real teacher's shape."""
    made = recipe(name)
    teachers = [shape_of(teacher, made.config.backbone.grid) for teacher in made.teachers]
    student = Student(made.config, tuple(teachers))
    targets = []
    for teacher, needs in zip(teachers, student.needs, strict=True):
        n_tokens = teacher.grid[0] * teacher.grid[1]
        tokens = torch.randn(2, len(needs.layers), teacher.has_cls + n_tokens, teacher.dim)
        projection = torch.randn(teacher.dim, teacher.projection_dim) if teacher.projection_dim else None
        head = TeacherHead(torch.ones(teacher.dim), torch.zeros(teacher.dim), projection)
        attention = torch.rand(2, n_tokens) if teacher.has_attention else None
        targets.append(Targets(tokens, needs.layers, teacher.has_cls, attention, head))
    batch = Batch(torch.randn(2, 3, 224, 224), torch.arange(2), None, tuple(targets))
    loss, _ = student(batch, student.draw_mask(batch, draw_noise(0, 0, 2, student.n_patches)))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)


def test_the_table_is_up_to_date():
    """docs/presets.md is what `python -m pipelines.presets` prints."""
    assert (Path(__file__).parent.parent / "docs" / "presets.md").read_text() == table()


def test_numbers_of_the_papers():
    """Batch, learning rate, epochs, mask, clip and crops of each method are its paper's or code's."""
    expected = {
        # preset: batch, peak rate, betas, warm-up, epochs, last rate, clip, drop path, crop scale, resample, jitter, visible
        "mae-b16": (4096, 2.4e-3, (0.9, 0.95), 40, 800, 0, None, 0, 0.2, "bicubic", 0, 49),
        "mr-mae-b16": (1024, 6e-4, (0.9, 0.95), 80, 400, 0, None, 0, 0.2, "bicubic", 0, 49),
        "mr-mcmae-b": (1024, 6e-4, (0.9, 0.95), 80, 400, 0, None, 0, 0.2, "bicubic", 0, 49),
        "mimco-b16": (2048, 4e-3, (0.9, 0.999), 10, 100, 2e-5, 5, 0.1, 0.67, "bilinear", 0, 76),
        "mimco-swin-t": (2048, 4e-3, (0.9, 0.999), 10, 100, 2e-5, 5, 0, 0.67, "bilinear", 0, 19),
        "cae-v2-b16": (2048, 1.5e-3, (0.9, 0.999), 10, 300, 1e-5, 3, 0.1, 0.4, "bicubic", 0.4, 98),
        "cae-v2-l16": (2048, 1.5e-3, (0.9, 0.999), 10, 300, 1e-5, 3, 0.2, 0.4, "bicubic", 0.4, 78),
        "maskalign-b16": (1024, 6e-4, (0.9, 0.95), 20, 200, 1e-5, None, 0.1, 0.2, "bicubic", 0, 58),
        "maskalign-l16": (1024, 6e-4, (0.9, 0.95), 20, 200, 1e-5, None, 0.2, 0.2, "bicubic", 0, 58),
        "milan-b16": (4096, 2.4e-3, (0.9, 0.95), 40, 400, 0, None, 0, 0.2, "bicubic", 0, 49),
    }
    for name, numbers in expected.items():
        made = recipe(name)
        config, optim, plan = made.config, made.config.optim, made.plan
        found = (
            config.batch_size, pytest.approx(optim.peak_lr(config.batch_size)), optim.betas, optim.warmup_epochs, config.epochs,
            optim.min_lr, optim.clip_grad, config.backbone.drop_path, plan.scale[0], plan.resample, plan.jitter,
            config.mask.n_keep(config.backbone),
        )  # fmt: skip
        assert numbers == found, name
        assert optim.weight_decay == 0.05 and plan.scale[1] == 1.0 and plan.flip_p == 0.5


def test_mismatches_are_named():
    """What differs between a cache and a preset is said field by field; the seed is free."""
    made = recipe("cae-v2-b16")
    assert made.mismatches(replace(made.plan, seed=7), ["clip-b16"]) == []
    assert made.mismatches(CropPlan(), ["dino-b16"]) == [
        "crop plan scale: [0.2, 1.0] in the cache, [0.4, 1.0] in the preset",
        "crop plan jitter: 0.0 in the cache, 0.4 in the preset",
        "teacher: dino-b16 in the cache, clip-b16 in the preset",
    ]


def test_variants_of_no_paper():
    """A preset that no paper has says so, has no number, and is its base but for the teacher."""
    for base, name in [("maskalign-b16", "maskalign-b16-dinov3"), ("milan-b16", "milan-b16-dinov3"),
                       ("mr-mae-b16", "mr-mae-b16-dinov3"), ("maskalign-b16", "maskalign-b16-siglip2")]:  # fmt: skip
        made, text = recipe(name), PRESETS[name].__doc__
        assert "a variant that no paper has" in text and "no number is known" in text and "Carried over:" in text
        assert f"--teacher {made.teachers[0]}" in text
        same = replace(made.config, preset=base, teachers=recipe(base).teachers)
        assert replace(made, config=same) == recipe(base)


def test_queues_hold_whole_batches():
    """MimCo's queue holds exactly two of the paper's batches."""
    objective = recipe("mimco-b16").config.objectives[0]
    assert isinstance(objective, ContrastConfig) and objective.queue == 2 * recipe("mimco-b16").config.batch_size


if __name__ == "__main__":
    lines = ["# losses of 10 steps of each preset's miniature on the CPU, seed 0; written by tests/test_pipelines_presets.py"]
    for preset in PRESETS:
        lines.append(" ".join([preset, *(f"{loss:.6g}" for loss in losses_of(*tiny(preset), n_steps=10))]))
    GOLDEN.write_text("\n".join(lines) + "\n")
