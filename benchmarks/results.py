"""`python -m benchmarks.results FOLDER`: tables of docs/results.md and pictures in docs/img, from what the benchmarks wrote.

The section "Benchmarks" of docs/results.md is replaced; the rest of the page is not touched.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from .__main__ import BENCHMARKS
from .measure import ROOT

HEADING = "## Benchmarks"
INTRODUCTION = """\
`make bench`, then `.venv/bin/python -m benchmarks.results bench-out`, which writes this section. Variants take turns in one run;
a ratio is the median of the rounds, with the lowest and the highest beside it. What a script does, and which settings its rivals
have, stands at its head in `benchmarks/`. A load above the number of CPUs means that other work took its share: then the ratios
of what runs on all CPUs against what runs on one are too low, and no rate is worth much.
"""
PICTURES = {
    "random-rows": ("Random rows of five int8 layers, warm", True),
    "joined-loader": ("The joined loader and its parts alone", True),
    "joined-loader-klt": ("The joined loader with targets of a transform", True),
    "joined-peers": ("Crops with five int8 layers, into batches", False),
    "visible-tokens": ("Batches for MaskAlign, ready for the student", False),
    "extraction": ("Extraction and its parts alone, CPU", True),
    "extraction-klt": ("Extraction of targets coded by a transform, CPU", True),
    "extraction-gpu": ("Extraction and its parts alone, GPU", True),
    "opening": ("Seconds to open and to inspect", True),
    "memory": ("Peak anonymous memory of a training run", False),
    "cold-disk": ("The joined loader on a cold and a warm disk", True),
    "student-step": ("Training from the cache and from one resident batch", False),
    "cached-or-live": ("Training from the cache and with the teacher on the spot", False),
}
"""Name -> title, and whether the axis is logarithmic."""
OURS, OTHER, MISSED = "#0b6e4f", "#8a99a8", "#c1440e"
OTHERS = ("LMDB", "zarr", "tensorstore", "webdataset", "litdata", "bare", "writing", "decode", " read,", "resident", "live",
          "teacher", ", not", "whole")  # fmt: skip
"""What is in the name of a rival, of a part alone, or of what was before."""


def read(folder: Path) -> list[dict]:
    """The documents of a folder, in the order of BENCHMARKS."""
    documents = [json.loads((folder / f"{name}.json").read_text()) for name in BENCHMARKS if (folder / f"{name}.json").exists()]
    if not documents:
        raise click.ClickException(f"{folder} holds no results. Make them: python -m benchmarks --out {folder}")
    return documents


def in_words(documents: list[dict]) -> str:
    """What stands below the heading, as Markdown."""
    run = [document for document in documents if "not_run" not in document]
    lines = [INTRODUCTION, "| claim | ratio | lowest .. highest | goal | |", "|---|---|---|---|---|"]
    for document in run:
        for claim in document["claims"]:
            sign = "at most" if claim["at_most"] else "at least"
            goal = "" if claim["goal"] is None else f"{sign} {claim['goal']:g}"
            verdict = {True: "met", False: "**missed**", None: ""}[claim["met"]]
            lines.append(f"| {document['name']}: {claim['name']} | {claim['ratio']:.3g} | "
                         f"{claim['lowest']:.3g} .. {claim['highest']:.3g} | {goal} | {verdict} |")  # fmt: skip
    lines += ["", "![Every claim against its goal](img/claims.png)"]
    for document in documents:
        lines += ["", f"### {document['name']}", ""]
        if "not_run" in document:
            lines.append(f"Not run: {document['not_run']}.")
            continue
        lines += [*(f"- {line}" for line in document["conditions"]), f"- {_provenance(document)}", ""]
        if document["name"] in PICTURES:
            lines.append(f"![{PICTURES[document['name']][0]}](img/{document['name']}.png)")
        else:
            lines += _figure_table(document["figures"])
    return "\n".join(lines)


def _provenance(document: dict) -> str:
    hardware = document["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items() if version)
    gpu = f", {hardware['gpu']}" if hardware["gpu"] else ", no GPU"
    return (
        f"`{document['command']}`, {document['date']}, commit {document['commit']}, load {document['load_average']} before; "
        f"{hardware['n_cpus']} CPUs ({hardware['cpu']}), {hardware['memory_gb']} GB{gpu}; {versions}"
    )


def _figure_table(figures: dict) -> list[str]:
    lines = ["| figure | |", "|---|---|"]
    for name, value in figures.items():
        text = ", ".join(f"{k} {_short(v)}" for k, v in value.items()) if isinstance(value, dict) else _short(value)
        lines.append(f"| {name} | {text} |")
    return lines


def _short(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw_figures(document: dict, path: Path) -> None:
    """One bar a variant, with the lowest and the highest round."""
    from matplotlib import pyplot

    title, is_log = PICTURES[document["name"]]
    rates = {name: value for name, value in document["figures"].items() if isinstance(value, dict) and "lowest" in value}
    names, medians = list(rates), [rate["median"] for rate in rates.values()]
    spread = [[m - r["lowest"] for m, r in zip(medians, rates.values(), strict=True)],
              [r["highest"] - m for m, r in zip(medians, rates.values(), strict=True)]]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.34 * len(names)))
    colours = [OTHER if any(word in f" {name}" for word in OTHERS) else OURS for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, height=0.62, error_kw={"ecolor": "#333333", "capsize": 2, "lw": 0.8})
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
    for place, rate in enumerate(rates.values()):
        text = f"{rate['median']:,.0f}" if rate["median"] >= 100 else f"{rate['median']:.3g}"
        axes.annotate(text, (rate["highest"], place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(next(iter(rates.values()))["unit"] + ", median and range of the rounds" + ", log axis" * is_log)
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, axes, path)


def draw_claims(documents: list[dict], path: Path) -> None:
    """How far every claim is from its goal: right of 1 it is met."""
    from matplotlib import pyplot

    claims = [
        (f"{document['name']}: {claim['name']}", claim)
        for document in documents
        for claim in document.get("claims", [])
        if claim["goal"]
    ]
    margins = [claim["goal"] / claim["ratio"] if claim["at_most"] else claim["ratio"] / claim["goal"] for _, claim in claims]
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.3 * len(claims)))
    colours = [OURS if claim["met"] else MISSED for _, claim in claims]
    axes.hlines(range(len(claims)), 1, margins, colors=colours, lw=2)
    axes.scatter(margins, range(len(claims)), c=colours, s=36, zorder=3)
    axes.axvline(1, color="#333333", lw=1)
    axes.set_yticks(range(len(claims)), [name for name, _ in claims], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.invert_yaxis()
    axes.set_xlabel("times better than the goal (1: just met), log axis")
    axes.set_title("Every claim against its goal", loc="left", fontsize=11)
    _save(figure, axes, path)


def _save(figure, axes, path: Path) -> None:
    from matplotlib import pyplot

    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--page", type=click.Path(path_type=Path, exists=True), default=ROOT / "docs" / "results.md", help="[default: ours]"
)
def main(folder: Path, page: Path):
    """Write what the benchmarks found (FOLDER of python -m benchmarks) into docs/results.md and docs/img."""
    import matplotlib

    matplotlib.use("agg")
    documents, text = read(folder), page.read_text()
    before, found, rest = text.partition(f"{HEADING}\n")
    if not found:
        raise click.ClickException(f"{page} has no section {HEADING!r}: add one where the results shall stand.")
    images = page.parent / "img"
    for document in documents:
        if document["name"] in PICTURES and "not_run" not in document:
            draw_figures(document, images / f"{document['name']}.png")
    draw_claims(documents, images / "claims.png")
    _, next_heading, after = f"\n{rest}".partition("\n## ")
    page.write_text(f"{before}{HEADING}\n\n{in_words(documents)}\n{next_heading}{after}")
    click.echo(f"{page}: {len(documents)} benchmarks; pictures in {images}")


if __name__ == "__main__":
    main()
