"""The page of a run."""

from __future__ import annotations

from pathlib import Path

from student.config import as_overrides
from student.errors import StudentError
from teacher_cache.errors import TeacherCacheError
from teacher_cache.estimating.verdict import hours

from ..page import data_uri, render
from .curves import curves
from .evaluations import Evaluations
from .pictures import Pictures, encoded_picture, look
from .run_facts import RunFacts

MUCH_WAITING = 0.05
"""Share of its time that a run may wait for data before the page calls it slow."""
SECTIONS = {
    "state": "State", "curves": "Curves", "evaluations": "Evaluations", "pictures": "What the student does", "speed": "Speed",
    "settings": "Settings", "data": "Data", "checkpoints": "Checkpoints",
}  # fmt: skip


def run_page(
    run: RunFacts, cache_dir: Path | None, n_crops: int, evaluations: Evaluations | None = None
) -> tuple[str, list[str]]:
    """HTML of the page, and what it lacks, a sentence each. cache_dir: where the cache lies; None: where the run says."""
    missing = []
    pictures: Pictures | None = None
    try:
        pictures = look(run, cache_dir, n_crops)
    except (TeacherCacheError, StudentError, FileNotFoundError) as error:  # a run that goes on removes its old checkpoints
        missing.append(f"No pictures. {error}")
    if run.n_torn:
        missing.append(f"{run.n_torn} lines of metrics.jsonl could not be read and are left out.")
    html = render(
        "run.html", sections=SECTIONS, name=run.path.resolve().name, preset=run.config.preset, missing=missing, state=_state(run),
        curves=curves(run) if run.n_steps else [], evaluations=(evaluations or Evaluations()).tables(),
        shown=_shown(pictures), about=pictures.about if pictures else [],
        step=pictures.step if pictures else None, is_small=bool(pictures) and len(pictures.crops[0].panels[0].pixels) < 96,
        speed=_speed(run), waiting=_waiting(run), settings=list(as_overrides(run.config).items()), data=_data(run),
        made_by=", ".join(f"{name} {version}" for name, version in run.description.get("made_by", {}).items()),
        checkpoints=[(path.name, n_bytes) for path, n_bytes in reversed(run.checkpoints.items())],
    )  # fmt: skip
    return html, missing


def _state(run: RunFacts) -> list[tuple[str, str | None]]:
    if not run.n_steps:
        return [("steps", "none logged yet")]
    done = "finished" if run.n_steps == run.total_steps else f"{run.n_steps / run.total_steps:.0%} of {run.total_steps:,}"
    return [
        ("begun from", run.begun_from),
        ("changed under way", "; ".join(map(str, run.changes)) or None),
        ("steps", f"{run.n_steps:,}, {done}"),
        ("epoch", f"{run.steps['epoch'][-1]:.4g} of {run.epochs}"),
        ("loss", f"{run.steps['loss'][-1]:.4g}, at the start {run.steps['loss'][0]:.4g}"),
        ("took", f"{hours(float(run.seconds.sum()))} of training"),
    ]


def _speed(run: RunFacts) -> list[tuple[str, str]]:
    if run.images_per_s is None:
        return []
    left = (run.total_steps - run.n_steps) * run.config.batch_size / run.images_per_s
    return [
        ("crops", f"{run.images_per_s:,.4g} a second, all processes together"),
        ("waited for data", f"{run.wait_share:.1%} of the time"),
        ("left", hours(left) if left else None),
    ]


def _waiting(run: RunFacts) -> tuple[str, str, str] | None:
    """(kind, word, text) of the notice about waiting."""
    if run.wait_share is None:
        return None
    if run.wait_share > MUCH_WAITING:
        text = (
            f"The run waits for data {run.wait_share:.0%} of its time. teacher-cache estimate --measure tells the disk. "
            "More --workers, fewer layers or a faster disk help."
        )
        return "warn", "Waiting.", text
    return "good", "Fed.", "The loader keeps up: the student hardly ever waits for data."


def _data(run: RunFacts) -> list[tuple[str, str | None]]:
    identity = run.description["identity"]
    mismatch = identity.get("accepted_mismatch")
    return [
        ("crops", identity.get("crops_id")),
        ("views", str(len(identity.get("views", [])))),
        ("pixels", _pixels(run.description.get("pixels"))),
        ("teachers", "; ".join(run.teachers) or "none"),
        ("accepted mismatch", "; ".join(mismatch) if mismatch else None),
        ("cache", run.description.get("data_from")),
    ]


def _pixels(pixels) -> str | None:
    if not isinstance(pixels, dict):
        return None
    return f"RGB in 0..1, less {pixels.get('mean')}, divided by {pixels.get('std')}"


def _shown(pictures: Pictures | None) -> list[dict]:
    """Crops with their panels as addresses of images."""
    if pictures is None:
        return []
    return [
        {
            "row": crop.row,
            "class_name": crop.class_name,
            "panels": [
                {
                    "title": panel.title,
                    "source": data_uri(*encoded_picture(panel.pixels)),
                    "is_map": max(panel.pixels.shape[:2]) < 32,
                }
                for panel in crop.panels
            ],
        }
        for crop in pictures.crops
    ]
