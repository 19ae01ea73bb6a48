"""teacher-cache teachers: which there are, to choose by."""

from __future__ import annotations

import dataclasses
import json

import click

from ..errors import UnknownNameError
from ..terminal.command import one_line_errors
from .options import JSON

SIZES = (224, 256)
"""Sides of an input that grids are given for, pixels: a student of 16 px patches has 14 x 14 of them, or 16 x 16."""

PAIRS = (
    "A student of 16 px patches on crops of 224 px has 14 x 14: so have teachers of 14 px patches with --image-size 196. On "
    "crops of 256 px it has 16 x 16: so have they with --image-size 224."
)


@click.command()
@click.option("--search", metavar="WORD", help="Only teachers with this in their name, family or licence, such as dino.")
@JSON
def teachers(search: str | None, as_json: bool):
    """List the teachers: families, sizes, grids, licences, bytes a crop, and where their weights come from.

    Grids are those at 224 and 256 px, by --image-size; - is a size that the patches do not fill. A student learns from teachers
    of its own grid. `a crop` are the bytes of what extract keeps by default: five layers in int8, their scales, and attention.

    \b
    Example:
      teacher-cache teachers
      teacher-cache teachers --search dino
      teacher-cache teachers --search dinov3 --json
    """
    with one_line_errors("", as_json=as_json):
        from ..teachers.families import known_teachers

        found = [known for known in known_teachers().values() if search is None or _matches(known, search)]
        if not found:
            families = ", ".join(dict.fromkeys(known.family for known in known_teachers().values()))
            raise UnknownNameError(
                f"--search {search}: no teacher of the table has that in its name, family or licence. Families: {families}. "
                "Other models may be teachers by timm:NAME or open_clip:ARCH/TAG all the same."
            )
        if as_json:
            click.echo(json.dumps([_as_json(known) for known in found], indent=1))
        else:
            _show(found, search is None)


def _matches(known, word: str) -> bool:
    texts = (known.name, known.family, known.licence, *known.marks)
    return any(word.lower() in text.lower() for text in texts)


def _bytes_a_crop(known, image_size: int) -> int | None:
    """Of what extract keeps by default of a teacher at an image size; None where its patches do not fill that."""
    from ..extraction.planning import ExtractPlan

    if known.grid_at(image_size) is None:
        return None
    teacher = known.spec(image_size)
    spec = ExtractPlan().store_spec(teacher, 1)
    return sum(spec.row_bytes(array, teacher) for array in spec.array_names)


def _as_json(known) -> dict:
    """All that is known of a teacher; of those of the project's own table also its entry there."""
    from ..teachers import TEACHERS

    entry = dataclasses.asdict(TEACHERS[known.name]) if known.name in TEACHERS else {}
    grids = {str(size): known.grid_at(size) for size in SIZES}
    sizes = dict.fromkeys((*SIZES, known.image_size))
    a_crop = {str(size): _bytes_a_crop(known, size) for size in sizes}
    return {**entry, **dataclasses.asdict(known), "marks": known.marks, "grids": grids, "bytes_a_crop": a_crop}


def _show(found: list, with_others: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..format.spec import ATTENTION_SOURCES
    from ..teachers import OTHER_TEACHERS, TEACHERS
    from ..words import human

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("teacher", "size", "patch", "px", *(f"at {size}" for size in SIZES), "CLS", "reg", "width", "attention",
                   f"a crop at {SIZES[0]}", "at its px"):  # fmt: skip
        table.add_column(column, no_wrap=True)

    def grid(known, size: int) -> str:
        sides = known.grid_at(size)
        return f"{sides[0]} x {sides[1]}" if sides else "-"

    def a_crop(known, size: int) -> str:
        n_bytes = _bytes_a_crop(known, size)
        return "-" if n_bytes is None else human(n_bytes)

    family = None
    for known in found:
        if known.family != family:
            family = known.family
            norm = "" if known.head == "layernorm" else "; no final norm"
            table.add_row(f"{family}: {', '.join([known.licence, *known.marks])}{norm}", style="bold")
        attention = ATTENTION_SOURCES[known.attention_source] if known.attention_source else "-"
        table.add_row(
            f"  {known.name}", known.size, str(known.patch_size), str(known.image_size), *(grid(known, size) for size in SIZES),
            "1" if known.has_cls else "-", str(known.n_registers or "-"), str(known.dim), attention, a_crop(known, SIZES[0]),
            a_crop(known, known.image_size),
        )  # fmt: skip
    console = Console(highlight=False, width=1000, no_color=True)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))

    gates = dict.fromkeys(f"gated: {known.family}, {known.gated}." for known in found if known.gated)
    click.echo("\n".join(["", PAIRS, *gates, ""]))
    for known in found:
        if known.name in TEACHERS:
            click.echo(f"{known.name:<12} {TEACHERS[known.name].about}\n{'':<12} weights: {TEACHERS[known.name].weights_from}")
    if with_others:
        for name, (about, weights_from) in OTHER_TEACHERS.items():
            click.echo(f"{name:<12} {about}\n{'':<12} weights: {weights_from}")
