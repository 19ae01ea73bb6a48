"""What a student's step consists of, on a batch that is on the device: turning stored targets into float (dequantising), pixels
into the student's input, forward and backward pass, optimizer.

The step is that of `student-train`; its optimizer takes turns with the two that torch has besides: `for each` works through lists
of tensors, `fused` is one kernel. Parts are timed alone, many times in a row, by CUDA events where there is a GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from pipelines.feed.cached_source import CachedSource
from pipelines.feed.teacher_values import teacher_shape
from student.modules.model import Student
from student.modules.pixels import normalise
from teacher_cache.device import pick_device

from . import made_up, measure
from .student_step import Loop, Resident, config_of

OPTIMIZERS = {"fused AdamW": {"fused": True}, "for-each AdamW": {"foreach": True}}


class Tapped(CachedSource):
    """A source that keeps the batch it gave last as it came to the device, `raw`."""

    def _batch(self, raw):
        self.raw = raw
        return super()._batch(raw)


def milliseconds(work: Callable[[], object], device: torch.device, n_times: int) -> float:
    """Of one `work`, the mean of `n_times` in a row after two that are not timed."""
    for _ in range(2):
        work()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(n_times):
            work()
        return 1e3 * (time.perf_counter() - started) / n_times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n_times):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / n_times


def use_optimizer(loop: Loop, kind: dict) -> None:
    """Let a trainer go on with AdamW of another implementation over the same groups."""
    before = loop.trainer.optimizer
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in before.param_groups]
    loop.trainer.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=before.defaults["betas"], **kind)


def forward_and_backward(loop: Loop, batch) -> None:
    """A step up to the gradients, without the wait for the device that a step has."""
    trainer = loop.trainer
    trainer.optimizer.zero_grad()
    mask = batch.mask or trainer._draw_mask(batch, 0)
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.autocast):
        loss, _ = trainer.forward(batch, mask, trainer._draw_drops(0))
    loss.backward()


@click.command()
@click.option("--preset", "presets", multiple=True, default=("maskalign-b16", "mr-mae-b16"), show_default=True)
@click.option("--device", default="auto", show_default=True, help="Without a GPU it is not run, unless this is cpu.")
@click.option("--batch", type=click.IntRange(1), help="[default: 256; with --tiny 8]")
@click.option("--dtype", default="int8", show_default=True, help="Of the targets; klt:BITS is decoded here.")
@measure.options
def main(presets, device: str, batch: int | None, dtype: str, tiny: bool, rounds: int, scratch: Path | None):
    """Milliseconds of the parts of a step, and the step with each optimizer."""
    if device == "auto" and measure.gpu_name() is None:
        measure.not_run("step-parts" + "-klt" * dtype.startswith("klt"), "no GPU here")
        return
    where, (name, _) = measure.environment(), pick_device(device, "auto")
    device = torch.device(name)
    teacher, batch, n_steps = (made_up.SMALL, batch or 8, 2) if tiny else (made_up.VIT_B16, batch or 256, 20)
    if device.type != "cuda":
        n_steps = min(n_steps, 4)
    claims, figures, conditions = [], {}, [f"{name}, batches of {batch}, {n_steps} steps a round, {dtype} targets"]
    with measure.scratch_folder(scratch, 0 if tiny else 4 * batch * 1_200_000) as folder:
        cache = made_up.make_cache(folder, 4 * batch, teacher.image_size)
        made_up.add_targets(cache, teacher, dtype=dtype, shard_rows=batch)
        shapes = (teacher_shape(teacher),)
        for preset in presets:
            config = config_of(preset, tiny, shapes, teacher.image_size, batch)
            student = Student(config, shapes)
            needs, options = student.needs, {"batch_size": batch, "device": name}
            sources = {"all tokens": Tapped(cache, [made_up.NAME], needs, **options)}
            ahead = Tapped(cache, [made_up.NAME], needs, masks=student.masks_ahead(config), **options)
            if ahead.masks is not None:
                sources["visible tokens"] = ahead
            parts = {}
            for tokens, source in sources.items():
                with contextlib.closing(source.micro_batches(0, 1)) as batches:
                    resident = Resident(next(batches), source.steps_per_epoch)
                    parts[f"dequantising, {tokens}"] = [
                        milliseconds(lambda s=source: s._targets(s.raw), device, n_steps) for _ in range(rounds)
                    ]
                    if tokens == list(sources)[-1]:
                        parts["normalising pixels"] = [
                            milliseconds(lambda s=source: normalise(s.raw.images), device, n_steps) for _ in range(rounds)
                        ]

            loops = {kind: Loop(config, resident, shapes, name, folder / f"{preset}-{kind}", False) for kind in OPTIMIZERS}
            for kind, loop in loops.items():
                use_optimizer(loop, OPTIMIZERS[kind])
            found = measure.take_turns({kind: lambda loop=loop: loop.take(n_steps) for kind, loop in loops.items()}, rounds)
            figures |= {f"{preset}: step, {kind}": rate for kind, rate in found.figures("crops/s").items()}
            first = next(iter(loops.values()))
            parts["forward and backward"] = [
                milliseconds(lambda loop=first, given=resident.batch: forward_and_backward(loop, given), device, n_steps)
                for _ in range(rounds)
            ]
            for kind, loop in loops.items():
                parts[kind] = [milliseconds(loop.trainer.optimizer.step, device, n_steps) for _ in range(rounds)]
                loop.close()

            whole = [1e3 * batch / rate for rate in found.rates["fused AdamW"]]
            used = f"dequantising, {list(sources)[-1]}"
            shares = [part / (part + step) for part, step in zip(parts[used], whole, strict=True)]
            goal = 0.05 if dtype.startswith("klt") and device.type == "cuda" else None
            claims.append(measure.claim(f"{used}, share of a step, {preset}", shares, goal, at_most=True))
            claims.append(
                measure.claim(f"step with fused / for-each AdamW, {preset}", found.over("fused AdamW", "for-each AdamW"), None)
            )
            for part, times in {**parts, "step, fused AdamW": whole}.items():
                figures[f"{preset}: {part}, time"] = {
                    "unit": "ms", "median": statistics.median(times), "lowest": min(times), "highest": max(times)
                }  # fmt: skip
            conditions.append(f"{preset}: layers {needs[0].layers}, {config.precision}")
    measure.report("step-parts" + "-klt" * dtype.startswith("klt"), claims, figures, conditions, where)


if __name__ == "__main__":
    main()
