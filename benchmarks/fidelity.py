"""What storing targets in fewer bytes does: bytes a row, the error of a token, and how far the loss and its gradient move.

Each method's student in miniature (student-train --tiny) takes the same crops, the same masks and the same weights twice: with
targets of the live teacher in float32, and with those of a store. The teacher is the built-in one, which was trained, on digits;
MimCo's is its own architecture with random weights, as no trained ones can be had without a download. With `--weights FILE
--images FOLDER` all five learn from a network that was trained on photographs.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from pipelines.demo.data import write_digits
from pipelines.feed.cached_source import CachedSource
from pipelines.feed.live_source import LiveSource
from pipelines.feed.teacher_values import teacher_shape
from pipelines.presets import recipe
from student.masking import draw_noise
from student.modules.model import Student
from teacher_cache.cache import Cache
from teacher_cache.encoding.fit import least_rows
from teacher_cache.errors import UsageError
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.dtypes import dtype_of
from teacher_cache.teachers import load_teacher

from . import made_up, measure

DEMO_PRESETS = ("mr-mae-b16", "maskalign-b16", "milan-b16", "cae-v2-b16")
GOALS = {"int8": (0.52, 0.01, 0.03), "int4": (0.33, 0.08, None), "klt:3.2": (0.2, 0.08, 0.03)}
"""dtype -> at most: bytes over float16, median error of a token, difference of loss and gradient."""


def bytes_over_float16(dtype: str) -> float:
    """Bytes of a row of five layers of a ViT-B/16, with its scales, over those of the same tokens as float16."""
    specs = [made_up.store_spec(made_up.VIT_B16, 4096, "last5", name, 2048) for name in (dtype, "float16")]
    mine, float16 = (sum(s.row_bytes(a, made_up.VIT_B16) for a in s.array_names if a != "attention") for s in specs)
    return mine / float16


def loss_and_gradient(student: Student, batch, mask) -> tuple[float, torch.Tensor]:
    """The loss and the gradient of all weights, as one vector."""
    student.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # drop path
    loss, _ = student(batch, mask)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def differences(preset: str, cache: Cache, store: str, teacher, n_batches: int) -> tuple[list[float], list[float]]:
    """Relative differences of the loss and of the gradient (L2), one a batch of 8 crops."""
    shape = teacher_shape(teacher.spec)
    config = recipe(preset).tiny((shape,), cache.plan.size).config
    student = Student(config, (shape,)).train()
    steps = min(n_batches, cache.n_images // config.batch_size)
    stored = CachedSource(cache, [store], student.needs, batch_size=config.batch_size).micro_batches(0, steps)
    live = LiveSource(cache, [teacher], student.needs, batch_size=config.batch_size).micro_batches(0, steps)
    losses, gradients = [], []
    for step, (exact, batch) in enumerate(zip(live, stored, strict=True)):
        assert torch.equal(exact.rows, batch.rows) and torch.equal(exact.images, batch.images)
        mask = student.draw_mask(exact, draw_noise(0, step, config.batch_size, student.n_patches))
        loss, gradient = loss_and_gradient(student, exact, mask)
        other_loss, other_gradient = loss_and_gradient(student, batch, mask)
        losses.append(abs(other_loss - loss) / abs(loss))
        gradients.append(((other_gradient - gradient).norm() / gradient.norm()).item())
    return losses, gradients


@click.command()
@click.option("--dtype", default="int8", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Trained ones, of --teacher.")
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="For them.")
@click.option("--teacher", "trained", default="timm:vit_small_patch14_dinov2", show_default=True)
@measure.options
def main(dtype: str, weights: Path | None, images: Path | None, trained: str, tiny: bool, rounds: int, scratch: Path | None):
    """Bytes, error of a token, loss and gradient of quantised targets against float ones. --rounds are batches here."""
    if (weights is None) != (images is None):
        raise click.UsageError("--weights and --images go together: trained weights, and photographs to run them on.")
    name = f"fidelity-{dtype.partition(':')[0]}"
    try:
        dtype = dtype_of(dtype)
    except UsageError as error:
        measure.not_run(name, str(error))
        return
    where = measure.environment()
    most_bytes, most_error, most_difference = GOALS.get(dtype, (None, None, None))
    share = bytes_over_float16(dtype)
    claims = [measure.claim("bytes / float16, five layers of a ViT-B/16", [share], most_bytes, at_most=True)]
    figures = {}
    with measure.scratch_folder(scratch) as folder:
        plan = ExtractPlan(layers="last5", dtype=dtype, shard_rows=64, batch_size=16)
        if weights:
            teachers = {trained: (images, (*DEMO_PRESETS, "mimco-s16"))}
        elif tiny:
            teachers = {"demo": (None, (DEMO_PRESETS[0], "mimco-s16"))}
        else:
            digits = write_digits(folder / "digits")
            teachers = {"demo": (digits / "val", DEMO_PRESETS), "moco-v3-s16": (None, ("mimco-s16",))}
        for teacher_name, (images, presets) in teachers.items():
            given = weights or (None if teacher_name == "demo" else "random:0")
            teacher = load_teacher(teacher_name, given, 224 if weights else None)
            n_rows, size = (16 if tiny or not images else 256), teacher.spec.image_size
            n_rows = max(n_rows, least_rows(plan.store_spec(teacher.spec, n_rows), teacher.spec))
            cache = made_up.make_cache(
                folder / teacher_name.replace(":", "_"), n_rows, size, images, CropPlan(size=size, scale=(0.5, 1.0))
            )
            extract_view(cache.view(0), teacher_name, teacher, plan)
            layers = cache.view(0).store(teacher_name).manifest.fidelity
            figures[f"error of a token, {teacher_name}"] = {
                "median": max(layer.median for layer in layers), "p99": max(layer.p99 for layer in layers),
                "n_tokens": layers[0].n_tokens, "of": "the worst of five layers",
            }  # fmt: skip
            medians = [layer.median for layer in layers]
            claims.append(measure.claim(f"error of a token, median, {teacher_name}", medians, most_error, at_most=True))
            for preset in presets:
                losses, gradients = differences(preset, cache, teacher_name, teacher, rounds)
                claims.append(measure.claim(f"loss, {preset}", losses, most_difference, at_most=True))
                claims.append(measure.claim(f"gradient, {preset}", gradients, most_difference, at_most=True))
    figures["claims that are missed"] = sum(claim.met is False for claim in claims)
    conditions = [
        "error: standardised by channel, relative L2 of a token (docs/format.md, section 6), on the tokens the quantiser was "
        "fitted on, of klt on others and without CLS; loss and gradient: relative difference and relative L2 difference, batches "
        "of 8, students of 2 to 5 blocks",
        f"{trained}: {weights.name}, trained"
        if weights
        else "demo: the built-in teacher, trained, on digits; moco-v3-s16: random weights, on made-up images",
    ]
    measure.report(name, claims, figures, conditions, where)


if __name__ == "__main__":
    main()
