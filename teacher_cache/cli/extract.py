"""teacher-cache extract: a teacher's targets, and the crops before them."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ..files.claims import taking_over
from ..terminal.command import one_line_errors, say
from ..words import quoted
from .options import (
    CACHE,
    CROP_OPTIONS,
    DRY_RUN,
    KEPT,
    REPAIR,
    SIDE,
    TAKE_OVER,
    Dtype,
    ShardRange,
    TokenChoice,
    grid_of,
    with_preset,
)
from .repair import refuse_beside_repair, repair_and_say


@click.command()
@CACHE
@CROP_OPTIONS
@click.option("--teacher", required=True, help="clip-b16, demo, timm:NAME ...: teacher-cache teachers lists them.")
@click.option("--weights", help="The teacher's weights: a file, or random:SEED for a trial.")
@click.option("--name", help="Name of the store, to keep several of one teacher. [default: the teacher's]")
@click.option("--layers", help="Blocks to keep: last5, last, or numbers from 1: 8,10,12. [default: last5]")
@click.option("--dtype", type=Dtype(), help="klt: coded by a transform, BITS a value on average, 1 to 6; klt alone is klt:3.2. "
              "[default: int8]")  # fmt: skip
@click.option("--tokens", "visible", type=TokenChoice(), help="all; or visible:K, CLS and the K patches of each crop that its "
              "attention draws first, for methods that learn from visible patches alone. [default: all]")  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(1, 1 << 20), help="Crops a shard: what an interruption loses at most. "
              "[default: 2048]")  # fmt: skip
@click.option("--shards", type=ShardRange(), help="Make only shards A to B-1 of each view; other processes make the others.")
@click.option("--join", is_flag=True, help="Take the next free block of shards, again and again, until all are made; any number "
              "of processes, on any machines that see CACHE, may do so at once.")  # fmt: skip
@click.option("--engine", type=click.Choice(["ray"]), help="Share the work among the nodes of a Ray cluster.")
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster: auto, the one this machine belongs to; "
              "local, a new one of this machine; or HOST:PORT.")  # fmt: skip
@click.option("--image-size", type=SIDE, help="Side of the teacher's input, pixels. [default: its own]")
@click.option("--batch-size", type=click.IntRange(1), help="Crops a forward pass. [default: 64, or as the store was begun]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="Of the forward pass. auto: bf16 on a GPU, fp32 on a CPU, also on one that has bf16.")  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Run the teacher's blocks through torch.compile.")
@REPAIR
@TAKE_OVER
@DRY_RUN
def extract(cache: Path, teacher: str, weights, name, layers, dtype, visible: int | None, shard_rows,
            shards: range | None, join: bool, engine: str | None, address: str, image_size, batch_size, device, precision,
            compiled: bool, repair: bool, take_over: bool, dry_run: bool, skip_bad: bool, workers: int | None,
            **crop_options):  # fmt: skip
    """Run a teacher over the crops of CACHE and store its targets; makes the crops first if there are none.

    On a finished cache it does nothing; on an interrupted one it goes on; with other parameters than those the cache was made
    with it refuses and says which differ. What is not given is as in the store that is there. With --repair it first mends lists,
    crops and the teacher's stores, then makes again exactly the shards that verify rejects.

    \b
    Example:
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache extract --teacher timm:vit_tiny_patch16_224 --weights random:0 --layers last CACHE
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --repair CACHE

    The GPUs of one machine share the work under torchrun, when the crops are there:

    \b
      torchrun --nproc-per-node 8 -m teacher_cache extract --teacher clip-b16 --weights ViT-B-16.pt CACHE

    Many machines: start the same command with --join on each, as often as there are GPUs. Processes may come and go at any time;
    what a dead one leaves is taken by the others. A shard that fails three times is left, and listed in the end. Without --join
    each process can be given a range of its own, --shards A:B.

    \b
      teacher-cache extract --join --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache status CACHE --watch
    """
    with one_line_errors(KEPT), taking_over(take_over):
        from ..extraction.make import TargetRequest, plan_cache
        from ..extraction.planning import CropRequest
        from ..extraction.ranks import Process
        from ..sharing.joining import join_plan, join_work

        if join:
            _refuse_beside_join(shards, repair, take_over)
        process = Process.current(shards, repair)
        request = TargetRequest(teacher, weights, name, layers, dtype, visible, shard_rows, image_size, batch_size, device,
                                precision, compiled, grid_of(crop_options["preset"]))  # fmt: skip
        if engine == "ray":
            from ..sharing.ray_core import extract_on_ray

            own = {"--join": join, "--shards": shards, "--repair": repair, "--take-over": take_over,
                   "--workers": workers is not None, "torchrun": process.world_size > 1}  # fmt: skip
            for given in (name for name, is_given in own.items() if is_given):
                raise UsageError(f"{given} is for processes that one starts oneself. Leave it out, or leave out --engine ray.")
            is_new = extract_on_ray(cache, CropRequest(**with_preset(crop_options)), request, address, skip_bad, dry_run)
            if not dry_run:
                _say_done(cache, teacher, is_new)
            return
        if address != "auto":
            raise UsageError("--address is of a Ray cluster. Give --engine ray with it, or leave it out.")
        if repair:
            refuse_beside_repair(cache, dry_run, shards)
            repair_and_say(cache, crop_options["images"], request.store_name)
        crops = CropRequest(**with_preset(crop_options))
        work = join_plan(cache, crops, request, process) if join else plan_cache(cache, crops, request, shards, process)
        if dry_run or work.is_idle:
            return
        from ..kernels import sigbus

        sigbus.install()
        if join:
            _say_done(cache, teacher, join_work(work, skip_bad, workers))
            return
        made = work.make(skip_bad, workers)
        if made.n_missing:
            say("Whoever makes the last one completes the store. Shards that nobody makes: run their range again.")
        else:
            _say_done(cache, teacher, made.is_new)


def _say_done(cache: Path, teacher: str, is_new: bool) -> None:
    where = quoted(cache)
    if is_new:
        say(f"Done. Next: teacher-cache inspect {where}; student-train --cache {where} --preset NAME --out RUN")
    else:
        say(f"{cache} already holds these targets of {teacher}. Nothing to do.")


def _refuse_beside_join(shards: range | None, repair: bool, take_over: bool) -> None:
    """Raise UsageError for options that --join has no use for."""
    if shards is not None:
        raise UsageError("--join takes what is free, and --shards makes a range of its own. Give one of them.")
    if repair:
        raise UsageError("--repair is for one process. First run it without --join.")
    if take_over:
        raise UsageError(
            "--take-over is a person's word, and --join is for many processes: without locks between their hosts they would take "
            "from each other. Leave it out: what a dead process holds is free five minutes after its last sign of life."
        )
