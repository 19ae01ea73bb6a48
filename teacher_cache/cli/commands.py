"""teacher-cache: crop | extract | inspect | show | report | verify | teachers. The edge: parses, calls the library, prints."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from ..errors import UsageError
from ..files.claims import taking_over
from ..files.space import require_space
from ..format.crop_plan import CROP_FORMATS, LARGEST_SIZE, LEAST_SIZE
from ..format.spec import CODECS, DTYPES
from ..terminal.command import one_line_errors, say
from ..words import human, quoted

KEPT = "Finished work is kept; the same command goes on from there."
CACHE = click.argument("cache", type=click.Path(path_type=Path))
SIDE = click.IntRange(LEAST_SIZE, LARGEST_SIZE)
CROP_SIZE = click.option("--crop-size", type=SIDE, help="Side of a crop, pixels; a teacher of another size resizes it. "
                         "[default: what the teacher takes; 224 for teacher-cache crop]")  # fmt: skip
CROP_FORMAT = click.option("--crop-format", type=click.Choice(list(CROP_FORMATS)), help="How crops are stored. [default: jpeg95]")


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
    CROP_SIZE,
    CROP_FORMAT,
    click.option("--seed", type=click.IntRange(0), help="Of the order of images and of all crops. [default: 0]"),
    click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded, and list them in skipped.txt."),
    click.option("--workers", type=click.IntRange(1), help="Threads that cut crops. [default: one a processor]"),
)  # fmt: skip


TAKE_OVER = click.option("--take-over", is_flag=True, help="Say that whoever holds CACHE is gone: do not watch its claim for "
                         "minutes first. A locked one is refused all the same. Not for scripts that several "
                         "processes run.")  # fmt: skip
REPAIR = click.option("--repair", is_flag=True, help="Mend what verify finds in CACHE, and say what was mended.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be made and how large it is; write nothing.")


class ShardRange(click.ParamType):
    """`A:B`, half-open like a slice of Python; A is 0 and B the end if left out."""

    name = "A:B"

    def convert(self, value, param, context) -> range:
        match = re.fullmatch(r"([0-9]*):([0-9]*)", value)
        shards = range(int(match[1] or 0), int(match[2] or sys.maxsize)) if match else range(0)
        if not shards:
            self.fail(f"{value!r} is no range of shards. Give A:B with A < B, such as 0:40.", param, context)
        return shards


class TokenChoice(click.ParamType):
    """`all` or `visible:K`, as the number of patches to keep: 0 is all."""

    name = "all|visible:K"

    def convert(self, value, param, context) -> int:
        match = re.fullmatch(r"visible:([1-9][0-9]{0,8})", value)
        if value != "all" and not match:
            self.fail(f"{value!r}: give all, or visible:K with the number of patches, such as visible:59.", param, context)
        return int(match[1]) if match else 0


class RowRange(click.ParamType):
    """`I`, one row, or `A:B`, half-open like a slice of Python."""

    name = "I|A:B"

    def convert(self, value, param, context) -> range:
        match = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", value)
        rows = range(int(match[1]), int(match[2] or int(match[1]) + 1)) if match else range(0)
        if not rows:
            self.fail(f"{value!r} is no row. Give a number from 0, or A:B with A < B, such as 0:8.", param, context)
        return rows


class PatchPlace(click.ParamType):
    """`R,C`: row and column of a patch, from 0."""

    name = "R,C"

    def convert(self, value, param, context) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,5}),([0-9]{1,5})", value)
        if not match:
            self.fail(f"{value!r} is no patch. Give its row and column from 0, such as 3,5.", param, context)
        return int(match[1]), int(match[2])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="teacher-cache")
def main():
    """Run a frozen vision teacher once, keep its tokens, train students from them as often as you like.

    \b
    Example:
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --images imagenet/train CACHE
      teacher-cache inspect CACHE

    Exit codes: 0 done; 1 the data or the machine is at fault (verify: not sound; inspect A B: they differ); 2 the command is
    (verify: could not check); 75 stopped by SIGTERM, run the same command again; 130 interrupted. Results go to stdout, all else
    to stderr.
    """


@main.command()
@CACHE
@CROP_OPTIONS
@REPAIR
@TAKE_OVER
@DRY_RUN
def crop(cache: Path, repair: bool, take_over: bool, dry_run: bool, skip_bad: bool, workers: int | None, **options):
    """Draw, cut and store the crops of CACHE, without a teacher.

    Needs the originals once; `extract` then reads the crops. Interrupted, it goes on where it stopped. With --repair it mends the
    lists and crops of a finished CACHE and makes nothing new; --images are needed only for crops that have to be cut again.

    A crop has any side from 8 to 4096 pixels. Random crops above 256 need this version of the program or a later one to be read.
    Hidden files and folders, and those of file systems (lost+found), are left out.

    \b
    Example:
      teacher-cache crop --images imagenet/train --views 2 CACHE
      teacher-cache crop --repair --images imagenet/train CACHE
    """
    with one_line_errors(KEPT), taking_over(take_over):
        from ..extraction.planning import CropRequest, plan_crops

        if repair:
            _refuse_beside_repair(cache, dry_run)
            _repair(cache, options["images"])
            return
        crops = plan_crops(cache, CropRequest(**_with_preset(options)), default_size=224)
        if crops.job is None:
            say(f"{cache} has all its crops. Nothing to do.")
        else:
            _say_space(cache, _say_crops(crops.job))
        if dry_run:
            return
        _make_crops(cache, crops.job, skip_bad, workers)
        if crops.job is not None:
            say(f"Done. Next: teacher-cache extract --teacher NAME {quoted(cache)}")


@main.command()
@CACHE
@CROP_OPTIONS
@click.option("--teacher", required=True, help="clip-b16, demo, timm:NAME ...: teacher-cache teachers lists them.")
@click.option("--weights", help="The teacher's weights: a file, or random:SEED for a trial.")
@click.option("--name", help="Name of the store, to keep several of one teacher. [default: the teacher's]")
@click.option("--layers", help="Blocks to keep: last5, last, or numbers from 1: 8,10,12. [default: last5]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: int8]")
@click.option("--tokens", type=TokenChoice(), help="all; or visible:K, CLS and the K patches of each crop that its attention "
              "draws first, for methods that learn from visible patches alone. [default: all]")  # fmt: skip
@click.option("--codec", type=click.Choice(list(CODECS)),
              help="auto compresses tokens where that saves at least 15 %. [default: auto]")  # fmt: skip
@click.option("--shard-rows", type=click.IntRange(1, 1 << 20), help="Crops a shard: what an interruption loses at most. "
              "[default: 2048]")  # fmt: skip
@click.option("--shards", type=ShardRange(), help="Make only shards A to B-1 of each view; other processes make the others.")
@click.option("--image-size", type=SIDE, help="Side of the teacher's input, pixels. [default: its own]")
@click.option("--batch-size", type=click.IntRange(1), help="Crops a forward pass. [default: 64, or as the store was begun]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="Of the forward pass. auto: bf16 on a GPU, fp32 on a CPU.")  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="Run the teacher's blocks through torch.compile.")
@REPAIR
@TAKE_OVER
@DRY_RUN
def extract(cache: Path, teacher: str, weights, name, layers, dtype, tokens: int | None, codec, shard_rows,
            shards: range | None, image_size, batch_size, device, precision, compiled: bool, repair: bool, take_over: bool,
            dry_run: bool, skip_bad: bool, workers: int | None, **crop_options):  # fmt: skip
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

    Many machines: make the crops with teacher-cache crop, see the number of shards with --dry-run, and start one process a range.
    They may start at the same moment; whoever makes the last shard completes the store. A range that was interrupted is
    started again. As a Slurm array of 16 tasks, with S shards a task:

    \b
      sbatch --array=0-15 task.sh, where task.sh has
      I=$SLURM_ARRAY_TASK_ID
      teacher-cache extract --teacher clip-b16 --weights ViT-B-16.pt --shards $((I*S)):$(((I+1)*S)) CACHE
    """
    with one_line_errors(KEPT), taking_over(take_over):
        from ..extraction.ranks import Share

        share = Share.of_this_process(shards, repair)
        share.require_own_device(device)
        from ..cache import Cache, view_path
        from ..device import pick_device
        from ..extraction.extract import extract_view, require_same_targets
        from ..extraction.fit import fit_bytes
        from ..extraction.planning import CropRequest, is_of_before, own_shards, plan_crops, plan_targets
        from ..kernels import sigbus  # what follows imports numba, which asks once how many threads it may have
        from ..store.manifest import is_begun
        from ..teachers import crop_size

        store_name = _store_name(name or teacher)
        if repair:
            _refuse_beside_repair(cache, dry_run, shards)
            _repair(cache, crop_options["images"], store_name)
        given = {"layers": layers, "dtype": dtype, "visible": tokens, "codec": codec, "shard_rows": shard_rows,
                 "batch_size": batch_size}  # fmt: skip
        plan, image_size = plan_targets(cache, store_name, image_size, **given)
        device, precision = pick_device(device, precision, share.local_rank)
        loaded = _load_teacher(teacher, weights, image_size, device, precision, is_of_before(cache, store_name))
        if compiled:
            loaded.compile()
        request = CropRequest(**_with_preset(crop_options))
        may_make = shards is None and share.world == 1
        crops = plan_crops(cache, request, default_size=crop_size(teacher, loaded.spec), may_make=may_make)
        for view in Cache(cache).views() if (cache / "cache.json").exists() else []:
            require_same_targets(view, store_name, loaded, plan)
        stores = [view_path(cache, number) / f"{store_name}.zarr" for number in range(crops.n_views)]
        n_bytes = _say_crops(crops.job) if crops.job else 0
        spec = plan.store_spec(loaded.spec, crops.n_images)
        shards = share.shards(shards, spec.n_shards)
        if not shards and shards is not None:
            say(f"There are {spec.n_shards} shards for {share.world} processes: none for this one.")
            return
        n_targets = _say_targets(stores, spec, loaded.spec, own_shards(shards, spec))
        n_bytes += n_targets if any(map(is_begun, stores)) else max(n_targets, fit_bytes(spec, loaded.spec))
        _say_space(cache, n_bytes, of_all=" by all shards, whoever makes them" if shards is not None else "")
        if dry_run:
            return
        if may_make:
            _make_crops(cache, crops.job, skip_bad, workers)
        sigbus.install()
        views = [Cache(cache).finished_view(number) for number in range(crops.n_views)]
        worked = [extract_view(view, store_name, loaded, plan, shards) for view in views]
        if _say_missing(stores):
            say("Whoever makes the last one completes the store. Shards that nobody makes: run their range again.")
        elif any(worked):
            where = quoted(cache)
            say(f"Done. Next: teacher-cache inspect {where}; student-train --cache {where} --preset NAME --out RUN")
        else:
            say(f"{cache} already holds these targets of {teacher}. Nothing to do.")


def _with_preset(options: dict) -> dict:
    """The options of the crop stage with the crop plan of the preset in the place of its name."""
    if not options["preset"]:
        return options
    from pipelines.presets import recipe

    return {**options, "preset": recipe(options["preset"]).plan}


def _refuse_beside_repair(cache: Path, dry_run: bool, shards: range | None = None) -> None:
    if dry_run:
        raise UsageError(f"--repair has no dry run. What there is to mend, this says: teacher-cache verify {quoted(cache)}")
    if shards is not None:
        raise UsageError("--repair looks at all shards: give it without --shards.")


def _repair(cache: Path, images: Path | None, store: str | None = None) -> None:
    """Mend lists, crops and, in every view, one store as far as that needs no teacher; say what was mended."""
    from ..cache import Cache
    from ..checking.repair import repair_lists, repair_store, repair_view
    from ..checking.verify import views_on_disk

    def mended():
        yield from repair_lists(cache)
        views = views_on_disk(Cache(cache))
        for view in views:
            yield from repair_view(view, images)
        for view in views:
            if store is not None and view.store_path(store).exists():
                yield from repair_store(view, store)

    n_mended = 0
    for line in mended():
        n_mended += 1
        say(f"mended   {line}")
    if not n_mended:
        say(f"{cache}: there was nothing to mend.")


def _load_teacher(teacher: str, weights: str | None, image_size: int | None, device: str, precision: str, as_begun: bool):
    from ..teachers import load_teacher

    loaded = load_teacher(teacher, weights, image_size, device, precision, as_begun)
    say(f"teacher  {loaded.spec.name}, weights {loaded.spec.weights} (sha256 {loaded.spec.weights_sha256[:12]}), "
        f"{loaded.precision} on {device}")  # fmt: skip
    if loaded.weights_read:
        say(f"         weights as they are in the file: {loaded.weights_read}")
    if weights and loaded.ignored_weights:
        say(f"         {len(loaded.ignored_weights)} tensors of that file belong to other parts and are left out, "
            f"e.g. {loaded.ignored_weights[0]}")  # fmt: skip
    return loaded


def _say_crops(job) -> int:
    """Say what crops will be made; returns the bytes that takes while it goes on."""
    from ..crops.images import in_one_line
    from ..extraction.cropping import bytes_to_write, estimate_crop_bytes

    n_images, n_views = len(job.images.names), len(job.views)
    if job.ignored:
        say(f"{len(job.ignored):,} files of {job.images_dir} are no images by their names and are left alone, e.g. "
            f"{job.ignored[0]!r}.")  # fmt: skip
    if job.left_out:
        say(in_one_line(job.left_out))
    _say_new(job.images_dir, job.new)
    one = estimate_crop_bytes(job)
    say(f"crops    {n_images:,} images in {len(job.images.classes):,} classes, {n_views} view{'s' * (n_views > 1)} to make, "
        f"{job.plan.kind} {job.plan.size} px, {job.crop_format}: about {human(one * n_images * n_views)} "
        f"({human(one)} each, measured on a few)")  # fmt: skip
    return bytes_to_write(job, one)


def _say_new(images: Path, new) -> None:
    """Say how many images of the folder the cache was made without."""
    if new:
        say(f"{len(new):,} images of {images} are not in this cache, which was made without them, e.g. {new[0]!r}.")


def _say_targets(stores: list[Path], spec, teacher, own: range) -> int:
    """Say what targets will be made, of the shards `own` of each store; returns the bytes that all shards still take.

    All of them, because they come to lie on one disk: processes that each looked at their own share would all begin, and fill it.
    """
    from ..store.writer import bytes_under_way, missing_bytes

    n_bytes = sum(missing_bytes(store, spec, teacher, own) for store in stores)
    share = f" for shards {own.start}:{own.stop}" if len(own) < spec.n_shards else ""
    say(f"targets  {len(stores)} view{'s' * (len(stores) > 1)} of {spec.n_rows:,} crops in {spec.n_shards:,} shards, "
        f"layers {', '.join(map(str, spec.layers))}, {spec.dtype}{', attention' * spec.attention}: "
        f"{human(n_bytes)} to write{share}")  # fmt: skip
    return sum(max(0, missing_bytes(store, spec, teacher) - bytes_under_way(store)) for store in stores)


def _say_missing(stores: list[Path]) -> bool:
    """Say how many shards of each store others still have to make; returns whether there are any."""
    from ..store.commits import count_commits
    from ..store.manifest import read_manifest

    missing = {}
    for store in stores:
        spec = read_manifest(store).store
        missing[store] = spec.n_shards - count_commits(store, spec)
        if missing[store]:
            say(f"{store}: {missing[store]:,} of {spec.n_shards:,} shards are still missing.")
    return any(missing.values())


def _make_crops(cache: Path, job, skip_bad: bool, workers: int | None) -> None:
    """Make the crops that are missing, or clear away what a killed process left when it had made the last of them."""
    from ..extraction.cropping import make_crops, remove_left_over

    if job is None:
        remove_left_over(cache)
        return
    made = make_crops(job, skip_bad, workers)
    if made.n_skipped:
        say(f"{made.n_skipped:,} images could not be decoded and were left out; {made.path / 'skipped.txt'} lists them.")


def _say_space(cache: Path, needed: int, of_all: str = "") -> None:
    from ..files.space import free_bytes

    say(f"space    {human(needed)} needed{of_all}, {human(free_bytes(cache))} free")
    require_space(cache, needed)


def _store_name(name: str) -> str:
    from ..store.manifest import store_file_name

    cleaned = store_file_name(name)
    if not cleaned or cleaned.startswith(".") or not all(c.isalnum() or c in "._-" for c in cleaned):
        raise UsageError(f"--name {name!r}: give letters, digits, '.', '_' and '-'.")
    return cleaned


@main.command()
@click.argument("cache", type=click.Path(path_type=Path), required=False)
@click.option("--teacher", help="clip-b16, demo, timm:NAME ... [default: the preset's]")
@click.option("--images", type=click.Path(path_type=Path), help="The originals: they are counted, and a few crops are cut to "
              "measure their bytes.")  # fmt: skip
@click.option("--n-images", type=click.IntRange(1), help="How many there will be, where they are not at hand.")
@click.option("--views", type=click.IntRange(1), help="Passes over the images. [default: 1, or what the cache has]")
@click.option("--layers", help="Blocks to keep: last5, last, or numbers from 1: 8,10,12. [default: last5]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="[default: int8]")
@click.option("--tokens", "visible", type=TokenChoice(), help="all, or visible:K, as for extract. [default: all]")
@click.option("--shard-rows", type=click.IntRange(1, 1 << 20), help="Crops a shard. [default: 2048]")
@click.option("--image-size", type=SIDE, help="Side of the teacher's input, pixels. [default: its own]")
@CROP_SIZE
@CROP_FORMAT
@click.option("--preset", help="What is to be trained: gives crop plan, epochs and what a step reads (student-train --list).")
@click.option("--epochs", type=click.IntRange(1), help="Of one run. [default: the preset's]")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Trainings from this cache.")
@click.option("--gpu-rate", type=click.FloatRange(0, min_open=True), help="Crops a second through the teacher on your GPU.")
@click.option("--student-rate", type=click.FloatRange(0, min_open=True), help="Crops a second that your GPU trains, without the "
              "teacher, never waiting.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure here what is not given: teacher, extraction, the preset's student, and "
              "the disk of CACHE. Takes about a minute, and up to 2 GB of disk for that time.")  # fmt: skip
@click.option("--weights", help="With --measure: the teacher's weights. [default: random ones, which take as long]")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", default="auto", show_default=True, help="With --measure: auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def estimate(cache: Path | None, as_json: bool, **options):
    """Say what a cache will cost and whether it will pay, before anything of it is written.

    Bytes, hours of extraction, bytes a second that training reads; and, for so many epochs and runs, hours from the cache against
    hours with the teacher in every step, all on one device. What is not known is not made up: the output says which option gives
    it. CACHE is where the cache shall lie (its disk is looked at) or one that is there, whose crops are then counted.
    [default: the current folder]

    \b
    Example:
      teacher-cache estimate --teacher clip-b16 --images imagenet/train --views 2 /data/cache
      teacher-cache estimate --preset milan-b16 --n-images 1281167 --gpu-rate 2500 --student-rate 1800
      teacher-cache estimate --preset maskalign-b16 --images imagenet/train --measure /data/cache
    """
    with one_line_errors("Nothing was written.", as_json=as_json):
        from ..estimating.estimate import Question, answer, in_words

        preset = options.pop("preset")
        answered = answer(Question(folder=cache or Path(), **options), _student_of(preset, options["teacher"]))
        click.echo(json.dumps(answered, indent=1) if as_json else in_words(answered))


def _student_of(preset: str | None, teacher: str | None):
    """What a preset says to an estimate (estimating.PresetFacts); None without one."""
    if preset is None:
        return None
    from pipelines.presets import recipe
    from pipelines.presets.student_rate import layers_read, student_of, student_rate

    from ..estimating.estimate import PresetFacts

    chosen = recipe(preset)
    if not chosen.teachers and teacher is None:
        raise UsageError(f"{preset} learns without a teacher: there is nothing to extract. Give --teacher, or another --preset.")

    def read(spec, visible):
        return layers_read(student_of(chosen.config, spec, visible or None), spec)

    def rate(spec, device):
        return student_rate(chosen.config, student_of(chosen.config, spec), spec, device)

    return PresetFacts(preset, chosen.plan, next(iter(chosen.teachers), teacher), chosen.config.epochs, read, rate,
                   max(1, len(chosen.teachers)))  # fmt: skip


@main.command()
@CACHE
@click.argument("other", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def inspect(cache: Path, other: Path | None, as_json: bool):
    """Say what CACHE holds: crops, teachers, layers, sizes, fidelity, which shards are there. Reads no tokens.

    With OTHER, a second cache, say what is equal and what differs: crops, teachers, settings, quantisers, and shards by their
    checksums. Exit code 0: a student would be given the same. 1: something differs.

    \b
    Example:
      teacher-cache inspect CACHE --json
      teacher-cache inspect CACHE /backup/CACHE
    """
    with one_line_errors("", as_json=as_json):
        from ..cache import Cache
        from ..inspecting.inspect import describe

        if other is not None:
            _compare(Cache(cache), Cache(other), as_json)
            return
        described = describe(Cache(cache))
        if as_json:
            click.echo(json.dumps(described, indent=1))
        else:
            from ..inspecting.table import show

            show(described)


def _compare(cache, other, as_json: bool) -> None:
    from ..inspecting.compare import compare

    lines = compare(cache, other)
    kinds = {line.kind for line in lines}
    equal = False if "differs" in kinds else None if "unknown" in kinds else True
    if as_json:
        click.echo(json.dumps({"paths": [str(cache.path), str(other.path)], "equal": equal,
                               "lines": [dataclasses.asdict(line) for line in lines]}, indent=1))  # fmt: skip
    else:
        for line in lines:
            click.echo(f"{line.kind:<8} {line.what}: {line.text}")
        click.echo({True: "A student would be given the same.", False: f"{cache.path} and {other.path} differ.",
                    None: "Whether a student would be given the same cannot be told from the records."}[equal])  # fmt: skip
    if not equal:
        sys.exit(1)


VIEW = click.option("--view", type=click.IntRange(0), default=0, show_default=True, help="Pass over the images, from 0.")
STORE = click.option("--teacher", help="Which store, if there are several.")


@main.command()
@CACHE
@click.option("--row", "rows", type=RowRange(), multiple=True, help="A row, or several as A:B; may be repeated. [default: 0]")
@VIEW
@STORE
@click.option("--images", type=click.Path(path_type=Path), help="The originals: draw the crop's box on them.")
@click.option("--patch", type=PatchPlace(), help="The patch that others are compared with. [default: the most attended]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the masks.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A .png, .pdf or .svg. [default: row-I-view-V.png]")
def show(cache: Path, rows: tuple[range, ...], view: int, teacher: str | None, images: Path | None, patch, seed: int,
         out: Path | None):  # fmt: skip
    """Draw a crop, what the teacher says of it, and what a student would see of it.

    One row: the crop (and its box on the original), CLS attention, the principal components of each layer's patch tokens as
    colours, their likeness to one patch, and a mask of each law that the presets use. Several rows make a sheet.

    \b
    Example:
      teacher-cache show --row 17 --images imagenet/train CACHE
      teacher-cache show --row 0:8 --row 100 --view 1 -o sheet.png CACHE
    """
    with one_line_errors(""):
        from pipelines.pages.of_crops.show import numbers_of
        from pipelines.pages.of_crops.show import show as draw

        numbers = numbers_of(rows or (range(1),))
        out = out or Path(f"row-{numbers[0]}{f'-and-{len(numbers) - 1}-more' * (len(numbers) > 1)}-view-{view}.png")
        draw(cache, numbers, view, out, say, teacher=teacher, images=images, patch=patch, seed=seed)
        say(f"Wrote {out}")


@main.command()
@CACHE
@VIEW
@STORE
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The page.")
@click.option("--rows", type=click.IntRange(4, 20_000), default=2000, show_default=True, help="Crops whose tokens are looked at.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of that sample, and of the map.")
@click.option("--verify", is_flag=True, help="Run verify now and put what it finds on the page.")
@click.option("--sample", type=click.IntRange(1), help="Rows of each store and view that --verify checks. [default: all]")
@click.option("--verified", type=click.Path(path_type=Path), help="Output of verify --json, in place of --verify.")
@click.option("--weights", help="The teacher's weights: run it on 64 crops and measure the true error of what is stored. A file, "
              "random:SEED or built-in.")  # fmt: skip
def report(cache: Path, out: Path, **options):
    """Write one page about CACHE: identity, coverage, fidelity, layers, attention, crop boxes, neighbours, a map.

    The page is a single file that loads nothing, for any browser. It looks closely at one store of one view, on a sample of its
    crops, so that its time does not grow with the cache; coverage and sizes are of everything. Nothing is written into CACHE.

    \b
    Example:
      teacher-cache report CACHE -o report.html
      teacher-cache report --verify --sample 1000 --weights ViT-B-16.pt CACHE
    """
    with one_line_errors(""):
        from pipelines.pages.of_cache.cache_report import Options
        from pipelines.pages.of_cache.cache_report import report as write

        n_bytes = write(cache, out, Options(**options), say)
        say(f"Wrote {out} ({human(n_bytes)})")


@main.command()
@CACHE
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--sample", type=click.IntRange(1), help="Check so many rows of each store and view, drawn at random, besides all "
              "small files, sizes and headers. [default: all rows; 64 for --images and --weights]")  # fmt: skip
@click.option("--images", type=click.Path(path_type=Path), help="The originals: cut a sample of crops again and compare.")
@click.option("--weights", help="The teacher's weights: run it on a sample of rows and compare. A file, random:SEED or built-in.")
@click.option("--teacher", help="Which store --weights belongs to, if there are several.")
def verify(cache: Path, as_json: bool, sample: int | None, images: Path | None, weights: str | None, teacher: str | None):
    """Check every byte of CACHE against the recorded checksums, that every row is there, and that the values make sense.

    Exit code 0: sound and complete. 1: damaged or unfinished. 2: could not check. Says which command mends what was found.

    \b
    Example:
      teacher-cache verify CACHE && student-train --cache CACHE --preset maskalign-b16 --out RUN
      teacher-cache verify --sample 1000 --images imagenet/train --weights ViT-B-16.pt CACHE
    """
    with one_line_errors("Nothing was changed.", as_json=as_json):
        from ..checking.advice import mending_commands
        from ..checking.findings import Checked
        from ..checking.remake import DEFAULT_ROWS, cut_views_again, load_teacher_of, new_in_folder, teach_views_again
        from ..checking.verify import open_cache
        from ..checking.verify import verify as verify_cache
        from ..crops.images import require_folder

        if images is not None:
            require_folder(images)
        if teacher is not None and weights is None:
            raise UsageError("--teacher chooses a store for --weights: give both.")
        opened, findings = open_cache(cache)
        checked = Checked(len(findings))
        if opened is not None:
            store, loaded = load_teacher_of(opened, weights, teacher) if weights else (None, None)
            findings, checked = verify_cache(opened, sample)
            if images is not None:
                _say_new(images, new_in_folder(opened, images))
                findings += cut_views_again(opened, images, sample or DEFAULT_ROWS, checked)
            if loaded is not None:
                findings += teach_views_again(opened, loaded, store, sample or DEFAULT_ROWS, checked)
        commands = mending_commands(cache, findings, str(images or "DIR"))
        if as_json:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            said = {"path": str(cache), "crops_id": opened.crops_id if opened else None, "when": when, "sample": sample,
                    "sound": not findings, **dataclasses.asdict(checked), "mend": commands}  # fmt: skip
            click.echo(json.dumps({**said, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=1))
        else:
            _print_findings(cache, findings, checked.in_words(), commands)
        if findings:
            sys.exit(2 if all(finding.kind == "unchecked" for finding in findings) else 1)


def _print_findings(cache: Path, findings: list, checked: list[str], commands: list[str]) -> None:
    """A table on a terminal, a line each in a pipe; then what mends them."""
    if sys.stdout.isatty() and findings:
        from rich.console import Console

        Console().print(_findings_table(cache, findings))
    else:
        for finding in findings:
            click.echo(f"{finding.kind:<10} {finding.path}: {finding.message}")
    n_findings = f"{len(findings)} finding{'s' * (len(findings) != 1)}." if findings else "sound and complete."
    click.echo("\n  ".join([f"{checked[0]} checked: {n_findings}", *checked[1:]]))
    if commands:
        click.echo("\n  ".join(["To mend it:", *commands]))


def _findings_table(cache: Path, findings: list):
    from rich.table import Table
    from rich.text import Text

    table = Table("", "where", "what")
    for finding in findings:  # as Text, because names may hold what rich takes for markup
        table.add_row(finding.kind, Text(str(Path(finding.path).relative_to(cache))), Text(finding.message))
    return table


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def teachers(as_json: bool):
    """List the teachers: widths, sizes, and where their weights come from.

    \b
    Example:
      teacher-cache teachers
    """
    with one_line_errors(""):
        from ..teachers import OTHER_TEACHERS, TEACHERS

        if as_json:
            click.echo(json.dumps([dataclasses.asdict(entry) for entry in TEACHERS.values()], indent=1))
            return
        for entry in TEACHERS.values():
            projection = f", projection {entry.projection_dim}" if entry.projection_dim else ""
            click.echo(f"{entry.name:<12} {entry.about}")
            click.echo(f"{'':<12} width {entry.dim}, {entry.depth} blocks, {entry.heads} heads, patch {entry.patch_size}, "
                       f"{entry.image_size} px, grid {entry.grid[0]} x {entry.grid[1]}{projection}")  # fmt: skip
            click.echo(f"{'':<12} weights: {entry.weights_from}")
        for name, (about, weights_from) in OTHER_TEACHERS.items():
            click.echo(f"{name:<12} {about}")
            click.echo(f"{'':<12} weights: {weights_from}")
