"""Extraction against its ceiling: the slower of the bare teacher, on equal batches that lie on its device, and the disk.

The store is begun and the quantiser fitted before; timed are whole shards, from decoding to the commit record. On a CPU the
quantiser and the teacher share the processors; on a GPU only what is not hidden behind the forward pass costs. Coding by a
transform (`--dtype klt:BITS`) is work of its own: the ceiling is then the teacher with it, and its share of the teacher's time is
said.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click
import numpy as np
import torch

from teacher_cache.crops.beton import CropReader
from teacher_cache.device import pick_device
from teacher_cache.encoding.encode import Encoder
from teacher_cache.encoding.fit import least_rows
from teacher_cache.extraction.extract import extract_view
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.store.store import Store
from teacher_cache.store.writer import ShardWriter
from teacher_cache.teachers import load_teacher

from . import made_up, measure


def bare_forward(teacher, images: list[torch.Tensor], layers: tuple[int, ...]) -> int:
    """The teacher over batches that are on its device; returns crops."""
    for batch in images:
        teacher(batch, layers)
    return _waited(teacher, images)


def encode_alone(teacher, outputs: list, images: list[torch.Tensor], encode: Encoder) -> int:
    """What a store keeps of outputs that are on the device, worked out and brought to the host; returns crops."""
    for output, batch in zip(outputs, images, strict=True):
        encode(output, np.arange(len(batch)))()
    return _waited(teacher, images)


def forward_and_encode(teacher, images: list[torch.Tensor], layers: tuple[int, ...], encode: Encoder) -> int:
    """The teacher, and what a store keeps of it, one after the other; returns crops."""
    for batch in images:
        encode(teacher(batch, layers), np.arange(len(batch)))()
    return _waited(teacher, images)


def _waited(teacher, images: list[torch.Tensor]) -> int:
    if teacher.device.type == "cuda":
        torch.cuda.synchronize(teacher.device)
    return sum(len(batch) for batch in images)


def write_alone(store: Path, teacher, spec, rows: dict[str, np.ndarray]) -> float:
    """Rows/s, negative (measure.take_turns), of a shard of rows that are quantised, durably written; it is removed again."""
    n_rows = len(spec.rows_of(0))

    def write() -> int:
        with ShardWriter(Store.open(store), 0) as out:
            for start in range(0, n_rows, 64):
                out.append({array: values[start : min(start + 64, n_rows)] for array, values in rows.items()})
        return n_rows

    rate = measure.rate_of(write)
    for array in spec.array_names:
        for file in (store / array).glob("c.0.*"):
            file.unlink()
    return -rate


def measured(name: str, device: str, precision: str, compiled: bool, rounds: int, folder: Path, crops_per_round: int, batch: int,
             dtype: str, label: str):  # fmt: skip
    """Claims, rates and conditions for one teacher; `label` is what they call it."""
    device, precision = pick_device(device, precision)
    teacher = load_teacher(name, None if name == "demo" else "random:0", None, device, precision)
    if compiled:
        teacher.compile()
    shard_rows, size = crops_per_round, teacher.spec.image_size
    plan = ExtractPlan(dtype=dtype, shard_rows=shard_rows, batch_size=batch)
    n_rows = shard_rows * (rounds + 3)  # one before, one to warm up, and one that stays undone: the store is never completed
    n_rows = max(n_rows, least_rows(plan.store_spec(teacher.spec, n_rows), teacher.spec))
    cache = made_up.make_cache(folder / name.replace(":", "_"), n_rows, size, plan=CropPlan(size=size, scale=(0.2, 1.0)))
    view = cache.view(0)
    extract_view(view, name, teacher, plan, range(0, 1))

    spec, crops = plan.store_spec(teacher.spec, n_rows), CropReader(view.path)
    images = [
        torch.from_numpy(crops.read(np.arange(start, min(start + batch, shard_rows)))).to(teacher.device)
        for start in range(0, shard_rows, batch)
    ]
    rng = np.random.default_rng(0)
    rows = {
        a: made_up.made_up_rows(rng, shard_rows, spec.row_shape(a, teacher.spec), spec.row_dtype(a)) for a in spec.array_names
    }
    written, shards = folder / f"{cache.path.parent.name}.zarr", itertools.count(1)
    made_up.begin_store(written, teacher.spec, spec)

    def extract() -> int:
        shard = next(shards)
        extract_view(view, name, teacher, plan, range(shard, shard + 1))
        return len(spec.rows_of(shard))

    runs = {
        f"{label}: extraction": extract,
        f"{label}: bare teacher": lambda: bare_forward(teacher, images, spec.layers),
        f"{label}: writing": lambda: write_alone(written, teacher, spec, rows),
    }
    ceiling, goal = "bare teacher", 0.97
    if spec.is_transformed:
        ceiling, goal, begun = "teacher and encoding", 0.95, Store.open(view.store_path(name))
        encode = Encoder(spec, begun.statistics(), 0, teacher.device, begun.transform())
        outputs = [teacher(batch, spec.layers) for batch in images[:4]]
        runs[f"{label}: teacher and encoding"] = lambda: forward_and_encode(teacher, images, spec.layers, encode)
        runs[f"{label}: encoding"] = lambda: encode_alone(teacher, outputs, images[:4], encode)
    found = measure.take_turns(runs, rounds)
    share = found.each(lambda r: r[f"{label}: extraction"] / min(r[f"{label}: {ceiling}"], r[f"{label}: writing"]))
    claims = [measure.claim(f"extraction / min({ceiling}, writing), {label}", share, goal)]
    if spec.is_transformed:
        taken = found.over(f"{label}: bare teacher", f"{label}: encoding")
        claims.append(measure.claim(f"time of encoding / of the teacher, {label}", taken, 0.2, at_most=True))
    row_bytes = sum(spec.row_bytes(array, teacher.spec) for array in spec.array_names)
    condition = (
        f"{label}: {teacher.spec.weights}, {precision} on {device}, {size} px, layers {', '.join(map(str, spec.layers))}, "
        f"{dtype}, {row_bytes:,} bytes a row, batches of {batch}, shards of {shard_rows}"
    )
    return claims, found.figures("crops/s"), condition


@click.command()
@click.option("--teacher", "teachers", multiple=True, help="[default: dino-s16; on a GPU clip-b16 and clip-l14]")
@click.option("--device", default="auto", show_default=True)
@click.option("--crops", type=click.IntRange(1), help="A round. [default: 192; on a GPU 2048]")
@click.option("--batch", type=click.IntRange(1), help="[default: 16; on a GPU 128]")
@click.option("--dtype", default="int8", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("auto",), type=click.Choice(["auto", "fp32", "bf16"]))
@click.option("--compile", "compiled", is_flag=True, help="Each also with torch.compile.")
@measure.options
def main(
    teachers, device: str, crops, batch, dtype: str, precisions, compiled: bool, tiny: bool, rounds: int, scratch: Path | None
):
    """Crops/s of extraction over the slower of the bare teacher and the disk. Files may go to --scratch /dev/shm."""
    if device.startswith("cuda") and measure.gpu_name() is None:
        measure.not_run("extraction-gpu", "no GPU here")
        return
    where = measure.environment()
    on_gpu = pick_device(device, "auto")[0] != "cpu"
    names = teachers or (("demo",) if tiny else ("clip-b16", "clip-l14") if on_gpu else ("dino-s16",))
    crops, batch = crops or (4 if tiny else 2048 if on_gpu else 192), batch or (2 if tiny else 128 if on_gpu else 16)
    claims, figures, conditions = [], {}, ["decoding, quantising, CRCs and fsync included; the quantiser's fit is not"]
    with measure.scratch_folder(scratch, 0 if tiny else crops * (rounds + 4) * 1_100_000) as folder:
        for name, precision, is_compiled in itertools.product(names, precisions, (False, True)[: 1 + compiled]):
            label = name + f" {precision}" * (precision != "auto") + " compiled" * is_compiled
            with measure.scratch_folder(folder) as own:  # the stores of one teacher are gone before the next ones are made
                found, rates, condition = measured(name, device, precision, is_compiled, rounds, own, crops, batch, dtype, label)
            claims += found
            figures |= rates
            conditions.append(condition)
    measure.report("extraction" + "-klt" * dtype.startswith("klt") + "-gpu" * on_gpu, claims, figures, conditions, where)


if __name__ == "__main__":
    main()
