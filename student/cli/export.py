"""student-export: a student's encoder in the layout of another library."""

from __future__ import annotations

import json
from pathlib import Path

import click

from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.words import human

from ..errors import StudentError
from .options import COMMAND_AT_FAULT, PATH, SETTINGS


@click.command(context_settings=SETTINGS)
@click.argument("run", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="A file (.safetensors for timm, .pth for torch), or for hf a folder.")
@click.option("--format", "layout", type=click.Choice(["timm", "hf", "torch"]), required=True,
              help="Who is to read it: timm; transformers; the code of MAE, or of MCMAE for its encoder.")  # fmt: skip
@click.option("--averaged", is_flag=True, help="Take the moving average of the weights (optim.ema), not the last ones.")
@click.option("--json", "as_json", is_flag=True, help="What was written, machine-readable.")
def export(run: Path, out: Path, layout: str, averaged: bool, as_json: bool):
    """Write a student's encoder for another library, with a model card beside it.

    RUN is the folder of a run, of which the newest checkpoint is taken, or one checkpoint. A ViT can go to all three formats, a
    Swin to timm, a masked-convolution ViT to torch. Heads, predictors and mask tokens stay behind. What is there already is left
    alone if it is the same, and refused if not.

    \b
    Example:
      student-export runs/a -o student.safetensors --format timm
      student-export runs/a -o student-hf --format hf --averaged

    Exit codes: 0 done, 1 the data or the run is at fault, 2 the command is, 130 interrupted.
    """
    with one_line_errors("Nothing was written, or the same command writes what is missing.", COMMAND_AT_FAULT, (StudentError,)):
        from ..exports.card import card
        from ..exports.writing import files_of, read_export, require_place, write

        require_place(out, layout)
        found = read_export(run, layout, averaged)
        text = card(found.record, out.name, found.norm_is_trained, _teacher_lines(found.record.made_from))
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


def _teacher_lines(facts: dict) -> list[str]:
    """What is known of the teachers of a run: their names, the weights that the cache has on record."""
    stored = facts["data"].get("teachers") if isinstance(facts["data"], dict) else None
    lines = []
    for index, name in enumerate(facts["teachers"]):
        about = stored[index] if isinstance(stored, list) and index < len(stored) and isinstance(stored[index], dict) else {}
        sha256 = about.get("weights_sha256")
        lines.append(f"`{name}`" + (f", weights sha256 `{sha256}`" if isinstance(sha256, str) else ""))
    return lines
