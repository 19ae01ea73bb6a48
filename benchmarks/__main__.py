"""`python -m benchmarks`: every benchmark that fits this machine, one after the other; a JSON file each.

A missed goal is said and is no failure; a script that breaks is one. Then `python -m benchmarks.results FOLDER` writes the tables
and pictures of docs/results.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from .measure import ROOT

BENCHMARKS: dict[str, tuple[str, ...]] = {
    "random-rows": ("random_rows",),
    "joined-loader": ("joined_loader",),
    "joined-loader-klt": ("joined_loader", "--dtype", "klt:3.2"),
    "joined-peers": ("joined_peers",),
    "visible-tokens": ("visible_tokens",),
    "extraction": ("extraction", "--device", "cpu"),
    "joining": ("joining",),
    "extraction-klt": ("extraction", "--device", "cpu", "--dtype", "klt:3.2"),
    "fidelity-int8": ("fidelity", "--dtype", "int8"),
    "fidelity-int4": ("fidelity", "--dtype", "int4"),
    "fidelity-klt": ("fidelity", "--dtype", "klt:3.2"),
    "target-codes": ("target_codes",),
    "opening": ("opening",),
    "epoch-ends": ("epoch_ends",),
    "starting": ("starting",),
    "cpu-bf16": ("cpu_bf16",),
    "memory": ("memory",),
    "fit-memory": ("fit_memory",),
    "cold-disk": ("cold_disk",),
    "student-step": ("student_step",),
    "cached-or-live": ("cached_or_live",),
    "extraction-gpu": ("extraction", "--device", "cuda"),
    "step-parts": ("step_parts",),
    "step-parts-klt": ("step_parts", "--dtype", "klt:3.2"),
}
"""Name -> module and options. The last five need a GPU."""


BY_HAND = ("scale", "ray_engine")
"""Modules that are run alone: one takes gigabytes of sparse files, the other Ray, which `[all]` does not bring."""


def run(name: str, options: list[str]) -> dict | None:
    """Run one benchmark, showing what it says; its JSON document, or None if it failed."""
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[name][0]}", *BENCHMARKS[name][1:], *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        last = ""
        for line in process.stdout:
            if not line.startswith("{"):
                click.echo(line, nl=False)
            last = line
    try:
        return json.loads(last) if process.returncode == 0 else None
    except ValueError:
        return None


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-out"), show_default=True, help="Where JSON goes.")
@click.option("--tiny", is_flag=True, help="As small as can be: that the scripts work, not what they measure.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path), help="Where caches are made, and deleted; 4 GB. [default: /tmp]")
def main(names: tuple[str, ...], out: Path, tiny: bool, rounds: int, scratch: Path | None):
    """Run the benchmarks NAMES, by default all, and write OUT/NAME.json.

    Those that need a GPU say so where there is none, and count as not run.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = ["--rounds", str(rounds), *["--tiny"] * tiny, *(["--scratch", str(scratch.absolute())] if scratch else [])]
    failed, lines = [], []
    for name in names or BENCHMARKS:
        started = time.perf_counter()
        click.echo(f"{name}:")
        document = run(name, options)
        if document is None:
            failed.append(name)
            (out / f"{name}.json").unlink(missing_ok=True)
            continue
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        lines += [f"{name}: not run: {document['not_run']}"] if "not_run" in document else _missed(document)
        click.echo(f"  took {time.perf_counter() - started:.0f} s\n")
    for line in [*lines, *(f"{name}: FAILED" for name in failed)]:
        click.echo(line)
    sys.exit(1 if failed else 0)


def _missed(document: dict) -> list[str]:
    claims = [claim for claim in document["claims"] if claim["met"] is False]
    return [f"{document['name']}: missed: {claim['name']}: {claim['ratio']:.3g}, goal {claim['goal']:g}" for claim in claims]


if __name__ == "__main__":
    main()
