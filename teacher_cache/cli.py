"""teacher-cache: crop | extract | inspect | verify | teachers. The edge: parses, calls the library, prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from .command import one_line_errors, say
from .crops import CROP_FORMATS, CropPlan
from .errors import UsageError
from .estimate import human, require_space

KEPT = "Finished work is kept; the same command goes on from there."
CACHE = click.argument("cache", type=click.Path(path_type=Path))


def _options(*options):
    """One decorator from several."""

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


CROP_OPTIONS = _options(
    click.option("--images", type=click.Path(path_type=Path), help="Folder of class folders with images, or of images."),
    click.option("--views", type=click.IntRange(1), help="Passes over the images, one crop an image each. [default: 1, "
                 "or what the cache has]"),
    click.option("--preset", help="Take the crop plan of this training preset (student-train --list)."),
    click.option("--plan", type=click.Choice(["random", "center"]), help="random: random resized crops for training; center: "
                 "short side resized, middle cut, for evaluation. [default: random]"),
    click.option("--crop-size", type=click.IntRange(8, 4096), help="Side of a crop, pixels. [default: the teacher's]"),
    click.option("--crop-format", type=click.Choice(list(CROP_FORMATS)), help="How crops are stored. [default: jpeg95]"),
    click.option("--seed", type=click.IntRange(0), help="Of the order of images and of all crops. [default: 0]"),
    click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded, and list them in skipped.txt."),
    click.option("--workers", type=click.IntRange(1), help="Threads that cut crops. [default: one a processor]"),
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="teacher-cache")
def main():
    """Run a frozen vision teacher once, keep its tokens, train students from them as often as you like.

    \b
    Example:
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache inspect CACHE
    """


@main.command()
@CACHE
@CROP_OPTIONS
@click.option("--dry-run", is_flag=True, help="Say what would be made and how large it is; write nothing.")
def crop(cache: Path, dry_run: bool, skip_bad: bool, workers: int | None, **options):
    """Draw, cut and store the crops of CACHE, without a teacher.

    Needs the originals once; `extract` then reads the crops. Interrupted, it goes on where it stopped.

    \b
    Example:
      teacher-cache crop --images imagenet/train --views 2 CACHE
    """
    with one_line_errors(KEPT):
        from .cropping import remove_finished_work

        job, n_bytes = _plan_crops(cache, default_size=224, **options)
        if job is None:
            say(f"{cache} has all its crops. Nothing to do.")
            if not dry_run:
                remove_finished_work(cache)
            return
        _say_space(cache, n_bytes)
        if not dry_run:
            _make_crops(job, skip_bad, workers)
            say(f"Done. Next: teacher-cache extract --teacher NAME {cache}")


@main.command()
@CACHE
@CROP_OPTIONS
@click.option("--teacher", required=True, help="clip-b16, demo, or timm:NAME (teacher-cache teachers).")
@click.option("--weights", help="The teacher's weights: a file, or random:SEED for a trial.")
@click.option("--name", help="Name of the store, to keep several of one teacher. [default: the teacher's]")
@click.option("--layers", help="Blocks to keep: last5, last, or numbers from 1: 8,10,12. [default: last5]")
@click.option("--dtype", type=click.Choice(["float16", "int8"]), help="[default: int8]")
@click.option("--codec", type=click.Choice(["auto", "zstd", "lz4", "none"]),
              help="auto compresses tokens where that saves at least 15 %. [default: auto]")  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(1, 1 << 20), help="Crops a shard: what an interruption loses at most. "
              "[default: 2048]")  # fmt: skip
@click.option("--image-size", type=click.IntRange(8, 4096), help="Side of the teacher's input, pixels. [default: its own]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="Of the forward pass. auto: bf16 on a GPU, fp32 on a CPU.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be made and how large it is; write nothing.")
def extract(cache: Path, teacher: str, weights, name, layers, dtype, codec, shard_rows, image_size, batch_size, device, precision,
            dry_run: bool, skip_bad: bool, workers: int | None, **crop_options):  # fmt: skip
    """Run a teacher over the crops of CACHE and store its targets; makes the crops first if there are none.

    On a finished cache it does nothing; on an interrupted one it goes on; with other parameters than those the cache was made
    with it refuses and says which differ. What is not given is as in the store that is there.

    \b
    Example:
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache extract --teacher timm:vit_tiny_patch16_224 --weights random:0 --layers last CACHE
    """
    with one_line_errors(KEPT):
        from .cache import Cache, view_path
        from .cropping import remove_finished_work
        from .device import pick_device
        from .extract import extract_view
        from .teachers import load_teacher
        from .writer import missing_bytes

        store_name = _store_name(name or teacher)
        given = {"layers": layers, "dtype": dtype, "codec": codec, "shard_rows": shard_rows, "batch_size": batch_size}
        plan, image_size = _extract_plan(cache, store_name, given, image_size)
        device, precision = pick_device(device, precision)
        loaded = load_teacher(teacher, weights, image_size, device, precision)
        job, crop_bytes = _plan_crops(cache, default_size=loaded.spec.image_size, **crop_options)
        n_images = len(job.images.names) if job else Cache(cache).n_images
        n_views = crop_options["views"] or (max(job.views) + 1 if job else len(Cache(cache).views()))

        spec = plan.store_spec(loaded.spec, n_images)
        stores = [view_path(cache, number) / f"{store_name}.zarr" for number in range(n_views)]
        token_bytes = sum(missing_bytes(store, spec, loaded.spec) for store in stores)
        say(f"teacher  {loaded.spec.name}, weights {loaded.spec.weights} (sha256 {loaded.spec.weights_sha256[:12]}), "
            f"{loaded.precision} on {device}")  # fmt: skip
        if weights and loaded.ignored_weights:
            say(f"         {len(loaded.ignored_weights)} tensors of that file belong to other parts and are left out, "
                f"e.g. {loaded.ignored_weights[0]}")  # fmt: skip
        say(f"targets  {n_views} view{'s' * (n_views > 1)} of {n_images:,} crops, layers {', '.join(map(str, spec.layers))}, "
            f"{spec.dtype}{', attention' * spec.attention}: {human(token_bytes)} to write")  # fmt: skip
        _say_space(cache, crop_bytes + token_bytes)
        if dry_run:
            return
        if job:
            _make_crops(job, skip_bad, workers)
        else:
            remove_finished_work(cache)
        opened = Cache(cache)
        worked = [extract_view(opened.finished_view(v), store_name, loaded, plan) for v in range(n_views)]
        if not any(worked):
            say(f"{cache} already holds these targets of {teacher}. Nothing to do.")
        else:
            say(f"Done. Next: teacher-cache inspect {cache}; student-train --cache {cache} --preset NAME --out RUN")


def _plan_crops(cache: Path, default_size: int, images, views, preset, plan, crop_size, crop_format, seed):
    """The crop job that the options ask for (None: nothing is missing) and the bytes it needs while it runs."""
    from .cache import Cache
    from .cropping import estimate_crop_bytes, plan_job

    existing = Cache(cache) if (cache / "cache.json").exists() else None
    base = existing.plan if existing else CropPlan(size=default_size)
    if preset:
        from pipelines.presets import recipe

        base = dataclasses.replace(recipe(preset).plan, seed=base.seed)
    base = base.changed(plan, crop_size, seed)
    crop_format = crop_format or (existing.identity.crop_format if existing else "jpeg95")
    n_views = views or (max(1, len(existing.views())) if existing else 1)
    if base.kind == "center" and n_views > 1:
        raise UsageError(f"--plan center draws the same crop in every view: --views {n_views} would store it {n_views} times.")
    job = plan_job(cache, images, base, crop_format, n_views)
    if job is None:
        return None, 0
    if job.n_ignored:
        say(f"{job.n_ignored:,} files of {images} are no images by their names and are left alone.")
    one = estimate_crop_bytes(job)
    n_crops = len(job.images.names) * len(job.views)
    say(f"crops    {len(job.images.names):,} images in {len(job.images.classes):,} classes, {len(job.views)} view"
        f"{'s' * (len(job.views) > 1)} to make, {base.kind} {base.size} px, {crop_format}: about {human(one * n_crops)} "
        f"({human(one)} each, measured on a few)")  # fmt: skip
    return job, one * (job.n_missing_crops + n_crops)  # the parts and, at the end, the files they are joined into


def _extract_plan(cache: Path, store_name: str, given: dict, image_size: int | None):
    """The ExtractPlan and image size that were given, completed from the store of view 0 if it was begun."""
    from .cache import view_path
    from .extract import ExtractPlan
    from .store import read_manifest

    store, base = view_path(cache, 0) / f"{store_name}.zarr", ExtractPlan()
    if (store / "store.json").exists():
        found = read_manifest(store)
        layers = ",".join(map(str, found.store.layers))
        base = ExtractPlan(layers=layers, dtype=found.store.dtype, shard_rows=found.store.shard_rows)
        image_size = image_size or found.teacher.image_size
    return dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None}), image_size


def _make_crops(job, skip_bad: bool, workers: int | None) -> None:
    from .cropping import make_crops

    made = make_crops(job, skip_bad, workers)
    if made.n_skipped:
        say(f"{made.n_skipped:,} images could not be decoded and were left out; {made.path / 'skipped.txt'} lists them.")


def _say_space(cache: Path, needed: int) -> None:
    from .estimate import free_bytes

    say(f"space    {human(needed)} needed, {human(free_bytes(cache))} free")
    require_space(cache, needed)


def _store_name(name: str) -> str:
    from .store import store_file_name

    cleaned = store_file_name(name)
    if not cleaned or cleaned.startswith(".") or not all(c.isalnum() or c in "._-" for c in cleaned):
        raise UsageError(f"--name {name!r}: give letters, digits, '.', '_' and '-'.")
    return cleaned


@main.command()
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def inspect(cache: Path, as_json: bool):
    """Say what CACHE holds: crops, teachers, layers, sizes, fidelity, how much is done. Reads no tokens.

    \b
    Example:
      teacher-cache inspect CACHE --json
    """
    with one_line_errors(""):
        from .cache import Cache
        from .inspect import describe

        described = describe(Cache(cache))
        click.echo(json.dumps(described, indent=1) if as_json else _inspect_text(described))


def _inspect_text(cache: dict) -> str:
    plan = cache["plan"]
    lines = [
        f"{cache['path']}  (crops {cache['crops_id'][:12]})",
        f"  images   {cache['n_images']:,} in {cache['n_classes']:,} classes"
        + (f", {cache['n_skipped']:,} left out (skipped.txt)" if cache["n_skipped"] else ""),
        f"  crops    {plan['kind']}, {plan['size']} px, {cache['crop_format']}, {plan['resample']}, seed {plan['seed']}"
        + ("" if plan["kind"] == "center" else f", scale {plan['scale'][0]:g} to {plan['scale'][1]:g}, flip {plan['flip_p']:g}"
           + f", jitter {plan['jitter']:g}" * bool(plan["jitter"])),
        f"  views    {len(cache['views'])}",
    ]  # fmt: skip
    for view in cache["views"]:
        lines.append(f"\n  view {view['view']}: crops.beton {human(view['crop_bytes'])}, "
                     f"{len(view['stores'])} teacher{'s' * (len(view['stores']) != 1)}")  # fmt: skip
        lines += [line for store in view["stores"] for line in _store_lines(store)]
    return "\n".join(lines)


def _store_lines(store: dict) -> list[str]:
    teacher, spec, per_crop = store["teacher"], store["store"], store["bytes_per_crop"]
    share = store["rows_done"] / store["rows"]
    on_disk = "nothing yet" if per_crop["on_disk"] is None else human(per_crop["on_disk"])
    codecs = sorted({codec for _, codec in spec["codecs"]})
    lines = [
        f"    {store['name']}: {teacher['name']}, weights {teacher['weights']} (sha256 {teacher['weights_sha256'][:12]}), "
        f"{teacher['image_size']} px, {store['precision']}",
        f"      rows      {store['rows_done']:,} of {store['rows']:,} ({share:.0%}), {store['shards_done']:,} of "
        f"{store['shards']:,} shards, {'complete' if store['complete'] else 'NOT complete: run extract again'}",
        f"      kept      layers {', '.join(map(str, spec['layers']))} of {teacher['depth']}, {spec['dtype']}, "
        f"codec {'/'.join(codecs)}" + ", attention" * spec["attention"],
        f"      bytes     {human(store['bytes'])}; a crop: {human(per_crop['float16'])} as float16 -> "
        f"{human(per_crop['quantised'])} quantised -> {on_disk} on disk",
        "      fidelity  standardised error of a token, in %: layer (median / p99 / worst)",
    ]
    for layer in store["fidelity"]:
        lines.append(f"                {layer['layer']:>2}  ({layer['median']:.2%} / {layer['p99']:.2%} / {layer['worst']:.2%})")
    return lines


@main.command()
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def verify(cache: Path, as_json: bool):
    """Check every file of CACHE against its recorded checksum, and that every row is there.

    Exit code 0: sound and complete. 1: damaged or unfinished. 2: could not check (no cache there).

    \b
    Example:
      teacher-cache verify CACHE && student-train --cache CACHE --preset maskalign-b16 --out RUN
    """
    with one_line_errors(""):
        from .cache import Cache
        from .errors import BadInputError
        from .verify import verify as verify_cache

        try:
            opened = Cache(cache)
        except BadInputError as error:
            say(f"Error: {error}")
            sys.exit(2)
        findings, n_files = verify_cache(opened)
        if as_json:
            click.echo(json.dumps({"path": str(cache), "sound": not findings, "n_files": n_files,
                                   "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))  # fmt: skip
        else:
            for finding in findings:
                click.echo(f"{finding.kind:<10} {finding.path}: {finding.message}")
            click.echo(f"{n_files:,} files checked: " + ("sound and complete." if not findings else f"{len(findings)} findings."))
        sys.exit(1 if findings else 0)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def teachers(as_json: bool):
    """List the teachers: widths, sizes, and where their weights come from.

    \b
    Example:
      teacher-cache teachers
    """
    from .teachers import TEACHERS

    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) for entry in TEACHERS.values()], indent=1))
        return
    for entry in TEACHERS.values():
        projection = f", projection {entry.projection_dim}" if entry.projection_dim else ""
        click.echo(f"{entry.name:<12} {entry.about}")
        click.echo(f"{'':<12} width {entry.dim}, {entry.depth} blocks, {entry.heads} heads, patch {entry.patch_size}, "
                   f"{entry.image_size} px, grid {entry.grid[0]} x {entry.grid[1]}{projection}")  # fmt: skip
        click.echo(f"{'':<12} weights: {entry.weights_from}")
    click.echo(f"{'timm:NAME':<12} any plain VisionTransformer of timm, e.g. timm:vit_small_patch16_224")
    click.echo(f"{'':<12} weights: downloaded by timm, or --weights PATH, or --weights random:SEED")


if __name__ == "__main__":
    main()
