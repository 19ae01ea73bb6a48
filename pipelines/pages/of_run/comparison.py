"""The page of several runs: their curves on each other, what differs in their settings, their evaluations side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup

from student.config import as_overrides
from teacher_cache.estimating.verdict import hours

from ..page import render
from .curves import STYLES, by_protocol, curve, line_chart, probe_caption, probe_line
from .evaluations import Evaluations
from .run_facts import RunFacts

LOOKS = [i % 6 + 6 * ((i + i // 6) % 3) for i in range(len(STYLES))]
"""Number in STYLES of each run's line: neighbours differ in colour and in stroke."""
DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5"}
SECTIONS = {"runs": "Runs", "curves": "Curves", "settings": "What differs", "evaluations": "Evaluations"}


def names_of(runs: Sequence[RunFacts]) -> list[str]:
    """What each run is called: the name of its folder; where two have the same, with as many folders above as tell them apart."""
    paths = [run.path.resolve() for run in runs]
    names = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        again = {name for name, n in Counter(names).items() if n > 1}
        names = ["/".join(path.parts[-depth:]) if name in again else name for name, path in zip(names, paths, strict=True)]
    return names


def comparison_page(runs: Sequence[RunFacts], names: Sequence[str], evaluations: Evaluations) -> tuple[str, list[str]]:
    """HTML of the page of these runs, and what it lacks, a sentence each."""
    missing = [f"{name}: {run.n_torn} lines of metrics.jsonl could not be read and are left out."
               for name, run in zip(names, runs, strict=True) if run.n_torn]  # fmt: skip
    missing += [f"{name} has no step logged yet." for name, run in zip(names, runs, strict=True) if not run.n_steps]
    kinds = {tuple((one.kind, one.weight) for one in run.config.objectives) for run in runs}
    html = render(
        "runs.html", sections=SECTIONS, names=list(names), missing=missing,
        runs=[[_swatch(i), name, *_told(run)] for i, (name, run) in enumerate(zip(names, runs, strict=True))],
        curves=_curves(runs, names), losses_differ=len(kinds) > 1, differing=differing(runs), evaluations=evaluations.tables(),
    )  # fmt: skip
    return html, missing


def differing(runs: Sequence[RunFacts]) -> list[list[str]]:
    """A row for each setting that is not the same in all runs: its name, and its value in each; empty where a run has none."""
    told = [_settings(run) for run in runs]
    rows = [[key, *(settings.get(key, "") for settings in told)] for key in dict.fromkeys(key for one in told for key in one)]
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(run: RunFacts) -> dict[str, str]:
    """Everything that a run was begun with, its data, and what was changed under way."""
    identity = run.description["identity"]
    constants = (str(one.get("shared_sha256", ""))[:12] for one in identity.get("teachers", []))
    data = {
        "crops": str(identity.get("crops_id"))[:12],
        "views": str(len(identity.get("views", []))),
        "targets": "; ".join(run.teachers),
        "quantiser, head and probe of the targets": "; ".join(constants),
        "begun from": run.begun_from or "random weights",
        "changed under way": "; ".join(map(str, run.changes)),
        "accepted mismatch": "; ".join(map(str, identity.get("accepted_mismatch") or [])),
    }
    return {key: str(value) for key, value in as_overrides(run.config).items()} | data


def _told(run: RunFacts) -> list[str]:
    """preset, steps, epoch, last loss, last probe, time, speed."""
    if not run.n_steps:
        return [run.config.preset, "none", "", "", "", "", ""]
    done = "finished" if run.n_steps == run.total_steps else f"{run.n_steps / run.total_steps:.0%}"
    probe = run.probes[-1]["probe"] if run.probes else None
    return [
        run.config.preset, f"{run.n_steps:,}, {done}", f"{run.steps['epoch'][-1]:.4g} of {run.epochs}",
        f"{run.steps['loss'][-1]:.4g}", f"{probe['values'][probe['main']]:.1%}" if probe else "",
        hours(float(run.seconds.sum())), f"{run.images_per_s:,.4g}",
    ]  # fmt: skip


def _swatch(number: int) -> Markup:
    """The line by which a run is drawn, as a legend has it."""
    colour, style = STYLES[LOOKS[number]]
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M1 4h26" fill="none" stroke-width="2.5" '
        'stroke="var(--{})" stroke-dasharray="{}"/></svg>'
    ).format(colour, DASHES[style])


def _curves(runs: Sequence[RunFacts], names: Sequence[str]) -> list[tuple[Markup, str]]:
    """(chart, caption) of what can be laid on each other: a run has the same line in all."""
    logged = [(i, name, run) for i, (name, run) in enumerate(zip(names, runs, strict=True)) if run.n_steps]

    def drawn(key: str, of, caption: str, **options) -> list[tuple[Markup, str]]:
        """of: run -> (epochs, values), None where it has none."""
        lines = {i: (name, *line) for i, name, run in logged if (line := of(run)) is not None}
        return [line_chart(key, list(lines.values()), caption, styles=[LOOKS[i] for i in lines], **options)] if lines else []

    charts = drawn("loss", lambda run: curve(run, run.steps["loss"]), "The loss that each run minimises")
    parts = Counter(name for _, _, run in logged for name in run.parts if "/" not in name)
    for number, part in enumerate(name for name, n in parts.items() if n > 1):
        of = lambda run, part=part: curve(run, run.parts[part]) if part in run.parts else None  # noqa: E731
        charts += drawn(f"part-{number}", of, f"Loss {part}, without its weight")
    charts += _probes(logged)
    charts += drawn("rate", lambda run: curve(run, run.steps["lr"]), "Learning rate")
    charts += drawn("speed", lambda run: curve(run, run.steps["images_per_s"], run.settled), "Crops a second", floor=0.0)
    return charts


def _probes(logged) -> list[tuple[Markup, str]]:
    """A chart for each protocol and set of images, of the figure that counts."""
    groups: dict[tuple, list] = {}
    for i, name, run in logged:
        for key, reports in by_protocol(run.probes).items():
            groups.setdefault(key, []).append((i, name, reports))
    charts = []
    for number, members in enumerate(groups.values()):
        first = members[0][2][0]["probe"]
        lines = [(name, *probe_line(reports, first["main"])) for _, name, reports in members]
        caption = f"{probe_caption(first)} ({first['main'].partition('/')[0]})"
        charts.append(line_chart(f"probe-{number}", lines, caption, marker="o", styles=[LOOKS[i] for i, *_ in members]))
    return charts
