"""student-export: a student's encoder in the layout of another library."""

from __future__ import annotations

import json
from pathlib import Path

import click

from teacher_cache.teachers import TIMM_PREFIX
from teacher_cache.teachers.families import known_teachers
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.words import human, quoted

from ..errors import StudentError
from .options import COMMAND_AT_FAULT, PATH, SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("run", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="A file (.safetensors for timm, .pth for torch), or for hf a folder.")
@click.option("--format", "layout", type=click.Choice(["timm", "hf", "torch"]), required=True,
              help="Who is to read it: timm; transformers; the code of MAE, or of MCMAE for its encoder.")  # fmt: skip
@click.option("--averaged", is_flag=True, help="Take the moving average of the weights (optim.ema), not the last ones.")
@click.option("--evaluations", type=PATH, multiple=True, help="Put results on the card: those of these very weights in this file "
              "of student-eval --record. Repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="What was written, machine-readable.")
def export(run: Path, out: Path, layout: str, averaged: bool, evaluations: tuple[Path, ...], as_json: bool):
    """Write a student's encoder for another library, with a model card beside it.

    RUN is the folder of a run, of which the newest checkpoint is taken, or one checkpoint. A ViT can go to all three formats, a
    Swin to timm, a masked-convolution ViT to torch. Heads, predictors and mask tokens stay behind. What is there already is left
    alone if it is the same, and refused if not.

    \b
    Example:
      student-export runs/a -o student.safetensors --format timm
      student-export runs/a -o student-hf --format hf --averaged
      student-export runs/a -o student.safetensors --format timm --evaluations results.jsonl

    Exit codes: 0 done, 1 the data or the run is at fault, 2 the command is, 130 interrupted.
    """
    with one_line_errors("Nothing was written, or the same command writes what is missing.", COMMAND_AT_FAULT, (StudentError,)):
        from ..exports.card import card
        from ..exports.writing import files_of, read_export, require_place, write

        require_place(out, layout)
        found = read_export(run, layout, averaged)
        results = _evaluation_lines(found.checkpoint, averaged, evaluations) if evaluations else []
        text = card(found.record, out.name, found.norm_is_trained, _teacher_lines(found.record.made_from), results)
        files = files_of(found)
        is_new = write(out, files, text)
        n_bytes = sum(map(len, files.values()))
        if as_json:
            click.echo(json.dumps({"out": str(out), "bytes": n_bytes, "new": is_new, "checkpoint": str(found.checkpoint),
                                   "record": found.record.to_json()}))  # fmt: skip
            return
        timm = found.record.timm
        given = "".join(f", {key}={value!r}" for key, value in timm.get("kwargs", {}).items())
        say(f"{out}: {human(n_bytes)} of {found.checkpoint}" + ("" if is_new else ", there already"))
        if timm and layout == "timm":
            say(f'read it  timm.create_model("{timm["name"]}", checkpoint_path="{out}", num_classes=0{given})')


def _evaluation_lines(checkpoint: Path, averaged: bool, files: tuple[Path, ...]) -> list[str]:
    """The records of these weights. Raises RunError for a file that cannot be read, ConfigError if none has any."""
    from ..errors import ConfigError
    from ..evals.records import cell, columns, groups, read, title
    from .evaluating.subjects import Resolver

    weights = Resolver(averaged=averaged, whats=(str(checkpoint),)).subject(str(checkpoint)).weights
    records = [record for path in files for record in read(path) if record["weights"] == weights]
    if not records:
        raise ConfigError(
            f"--evaluations {', '.join(map(str, files))}: no record is of the weights of {checkpoint}. Make one: "
            f"student-eval knn {quoted(checkpoint)} --train DIR --val DIR --record FILE."
        )
    return [
        f"{record['evaluator']}, {record['readout']}: "
        + ", ".join(f"{name} {cell(record, name)}" for name in columns([record]))
        + f" ({' '.join(title(group).split())})"
        for group in groups(records)
        for record in group
    ]


def _teacher_lines(facts: dict) -> list[str]:
    """What is known of the teachers of a run: their names, the weights that the cache has on record, their licence."""
    stored = facts["data"].get("teachers") if isinstance(facts["data"], dict) else None
    lines = []
    for index, name in enumerate(facts["teachers"]):
        about = stored[index] if isinstance(stored, list) and index < len(stored) and isinstance(stored[index], dict) else {}
        sha256, licence = about.get("weights_sha256"), _licence(name)
        lines.append(
            f"`{name}`" + (f", weights sha256 `{sha256}`" if isinstance(sha256, str) else "")
            + (f", published under {licence}" if licence else ", licence not on record: look where its weights come from")
        )  # fmt: skip
    return lines


def _licence(teacher: str) -> str | None:
    """What a teacher's weights were published under, as the table of teachers says; of other models of timm, as timm does."""
    if teacher in (known := known_teachers()):
        return known[teacher].licence
    if not teacher.startswith(TIMM_PREFIX):
        return None
    import timm

    found = timm.get_pretrained_cfg(teacher.removeprefix(TIMM_PREFIX))
    return found.license if found is not None else None
