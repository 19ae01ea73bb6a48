"""Extraction on Ray against one process: two workers of one CPU slot each, on a cluster of this machine, over twice one process.

A compute-bound teacher with one core and one thread a process: dino-s16 with random weights. Crops are there, the store is begun
and its quantiser fitted; counted is from the first commit at which all workers held shards to the last one, decoding included:
starting Python and loading the teacher are in neither.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from teacher_cache.cache import Cache
from teacher_cache.format.crop_plan import CropPlan

from . import made_up, measure

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def extract(cache: Path, teacher: str, *words: str) -> None:
    """`teacher-cache extract`, in one thread."""
    weights = [] if teacher == "demo" else ["--weights", "random:0"]
    command = [sys.executable, "-m", "teacher_cache", "extract", "--teacher", teacher, *weights, *words, str(cache)]
    done = subprocess.run(command, cwd=measure.ROOT, env={**os.environ, **ONE_THREAD}, text=True, stderr=subprocess.PIPE)
    if done.returncode:
        raise click.ClickException(done.stderr)


def rate_between_commits(cache: Path, begun: Path, n_workers: int, *run) -> float:
    """Crops/s, negative (measure.take_turns), of an extraction that goes on from a copy of the store `begun`."""
    store = Cache(cache).view(0).path / begun.name
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(begun, store)
    before = {path.name for path in store.glob("commits/*.json")}
    process = subprocess.Popen([sys.executable, "-c", WATCH, str(store), *sorted(before)], stdout=subprocess.PIPE, text=True)
    try:
        extract(cache, *run)
    finally:
        process.terminate()
    seen = [line.split() for line in process.communicate()[0].splitlines()]
    first = next((place for place, (_, n_claims) in enumerate(seen) if int(n_claims) >= n_workers), None)
    if first is None or first + 2 > len(seen):
        raise click.ClickException(f"{n_workers} workers were never at work together: give more --shards.")
    times = [float(moment) for moment, _ in seen[first:]]
    return -(len(times) - 1) * Cache(cache).view(0).store(store.stem).spec.shard_rows / (times[-1] - times[0])


WATCH = """
import os, sys, time
store, *before = sys.argv[1:]
seen = set(before)
while True:
    try:
        names = {name for name in os.listdir(store + "/commits") if name.endswith(".json")}
    except FileNotFoundError:
        names = set()  # the store is complete
    try:
        claims = [name.split(".")[0].split("-") for name in os.listdir(store + ".claims") if name.endswith(".claim")]
    except FileNotFoundError:
        claims = []
    n_claims = sum(len(extent) == 2 and extent[0] != extent[1] for extent in claims)
    for name in sorted(names - seen):
        print(time.time(), n_claims, flush=True)
    seen |= names
    time.sleep(.005)
"""
"""Prints the moment of every commit record that comes to be, and how many hold shards then."""


@click.command()
@click.option("--teacher", default=None, help="[default: dino-s16]")
@click.option("--shards", type=click.IntRange(4), help="A round. [default: 32]")
@measure.options
def main(teacher: str | None, shards: int | None, tiny: bool, rounds: int, scratch: Path | None):
    """Crops/s of --engine ray with two workers over twice those of one process; under 5 minutes at --rounds 3."""
    os.environ |= {**ONE_THREAD, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # on this machine, for this run
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ModuleNotFoundError:
        measure.not_run("ray-engine", "Ray is not installed: pip install 'teacher-cache[ray]'")
        return
    where = measure.environment()
    teacher, n_shards, shard_rows = teacher or ("demo" if tiny else "dino-s16"), shards or (160 if tiny else 32), 2 if tiny else 8
    with measure.scratch_folder(scratch, 2 << 30) as folder:
        size = 32 if teacher == "demo" else 224
        cache = made_up.make_cache(folder, shard_rows * (n_shards + 1), size, plan=CropPlan(size=size, scale=(0.2, 1.0))).path
        words = ["--shard-rows", str(shard_rows), "--batch-size", str(shard_rows)]
        extract(cache, teacher, *words, "--shards", "0:1")
        begun = Path(shutil.move(next(cache.glob("view-000/*.zarr")), folder))
        cluster = Cluster(True, head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20})
        found = measure.take_turns(
            {
                "one process": lambda: rate_between_commits(cache, begun, 1, teacher, *words),
                "Ray, two workers": lambda: rate_between_commits(
                    cache, begun, 2, teacher, *words, "--engine", "ray", "--address", cluster.address
                ),
            },
            rounds,
        )
        cluster.shutdown()
    share = found.each(lambda rates: rates["Ray, two workers"] / (2 * rates["one process"]))
    conditions = [
        f"{teacher}, random weights, fp32, {size} px, {n_shards} shards of {shard_rows} crops, one thread a process; decoding, "
        "quantising, CRCs and fsync included",
        f"ray {ray.__version__}, a cluster of this machine with two slots, its own processes on the same CPUs",
    ]
    measure.report("ray-engine", [measure.claim("Ray, two workers / twice one process", share, 0.93)],
                   found.figures("crops/s"), conditions, where)  # fmt: skip


if __name__ == "__main__":
    main()
