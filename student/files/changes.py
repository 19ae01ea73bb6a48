"""What was changed in a run under way: its configuration is a function of the step.

A run keeps the configuration it was begun with, and a list of changes beside it (config.json, and in each checkpoint those that
led to its weights). A run that goes on from an older checkpoint takes every step with the values that the step has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..config import TrainConfig, as_overrides, with_overrides
from ..errors import ConfigError, RunError

EPOCHS = "epochs"
"""Key of a change of a finished run: the epochs it goes on to. Those that are added have a schedule of their own."""
VIEWS = "views"
"""Key of a change of the data source: the sha256 of the crops of each view, in order."""

REASONS = {
    "backbone": "the weights have its shape",
    "mask": "what the weights have learned depends on it",
    "teachers": "what the weights have learned depends on them",
    "objectives": "what its heads have learned depends on it; of a loss, its weight can be changed",
    "batch_size": "steps and rows are counted in it",
    EPOCHS: "the learning rate of the steps so far depends on it; a finished run goes on with --extend-epochs",
    "seed": "the order of the rows depends on it",
    "accumulate": "it is no part of the run: give --micro-batch",
    "precision": "the steps so far were taken with it",
    "preset": "it is the name of what the run was begun with",
}
"""Why settings cannot be changed in a run under way; by the first of their dotted names."""


@dataclass(frozen=True)
class Change:
    """One setting from one step on."""

    step: int  # completed steps when it was changed: the next step is the first with the new value
    key: str  # dotted, as --set takes it, or VIEWS
    old: object  # JSON values
    new: object

    def __str__(self) -> str:
        return f"{self.key} {_text(self)} from step {self.step + 1:,} on"


def _text(change: Change) -> str:
    values = (change.old, change.new)
    old, new = map(len, values) if change.key == VIEWS else map(json.dumps, values)
    return f"{old} -> {new}"


def to_json(changes: Sequence[Change]) -> list[dict]:
    return [dataclasses.asdict(change) for change in changes]


def from_json(value, where: str) -> tuple[Change, ...]:
    """The changes that `to_json` gave. Raises RunError, naming `where` they stand, for anything else."""
    try:
        changes = tuple(Change(**item) for item in value)
        steps = [change.step for change in changes]
        if not all(type(change.step) is int and type(change.key) is str for change in changes) or steps != sorted(steps):
            raise TypeError("not in order")
        if steps and steps[0] < 0 or not all(_is_views(c.old) and _is_views(c.new) for c in changes if c.key == VIEWS):
            raise TypeError("not possible")
        if not all(type(c.old) is type(c.new) is int and 0 < c.old < c.new for c in changes if c.key == EPOCHS):
            raise TypeError("not possible")
        return changes
    except TypeError as error:
        raise RunError(f"{where} has a list of changes that cannot be read ({error}). Restore it.") from error


def _is_views(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


def config_at(config: TrainConfig, changes: Sequence[Change], step: int) -> TrainConfig:
    """The configuration of the step behind `step` completed ones. Raises ConfigError if a change does not fit `config`."""
    texts = {change.key: _as_text(change.new) for change in changes if change.step <= step and change.key != VIEWS}
    return with_overrides(config, texts) if texts else config


def schedule_at(config: TrainConfig, changes: Sequence[Change], step: int) -> tuple[int, int]:
    """The schedule of the learning rate that the step behind `step` completed ones is part of: its first epoch, and its end.

    A run has one schedule, from 0 to its epochs, and one more each time that it was extended.
    """
    begin, end = 0, config.epochs
    for change in changes:
        if change.key == EPOCHS and change.step <= step:
            begin, end = end, change.new
    return begin, end


def total_epochs(config: TrainConfig, changes: Sequence[Change]) -> int:
    """Epochs of the whole run, with those that were added."""
    return next((change.new for change in reversed(changes) if change.key == EPOCHS), config.epochs)


def _as_text(value) -> str:
    """What `with_overrides` takes for a JSON value."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def extended(
    config: TrainConfig,
    recorded: Sequence[Change],
    requests: Mapping[str, str],
    step: int,
    views: Sequence[str] = (),
    views_of: Callable[[int], list[str]] | None = None,
    steps_per_epoch: int = 0,
) -> tuple[Change, ...]:
    """The recorded changes, and those that `requests` (key -> text) add behind `step` completed steps.

    What the record ends with already adds nothing. Where steps are taken again, from an older checkpoint, a new value takes the
    place of what was changed there later.
    views: of the data source, as the run was begun.  views_of: number of views -> theirs; None if the source cannot change them.
    steps_per_epoch: of the source, to tell whether the run is finished, of which alone EPOCHS can be changed, to more of them.
    Raises ConfigError for a key that cannot be changed, with the reason, or a wrong value.
    """
    changes = list(recorded)
    settings = {key: text for key, text in requests.items() if key != VIEWS}
    for key in settings:
        if key != EPOCHS:
            _require_changeable(config, key)
    wanted = with_overrides(config_at(config, changes, max([0, *(change.step for change in changes)])), settings)
    if EPOCHS in settings:
        _require_extensible(total_epochs(config, changes), wanted.epochs, step, steps_per_epoch)
    if (wanted.optim.ema is None) != (config.optim.ema is None):
        raise ConfigError(
            f"optim.ema={settings['optim.ema']} cannot be set in a run under way: an average of the weights is kept from the "
            "first step on or not at all. Its decay can be changed where there is one. Start a new run in another directory."
        )
    if VIEWS in requests and views_of is None:
        raise ConfigError("The data source of this run cannot change its views.")
    for key, text in requests.items():
        begun = list(views) if key == VIEWS else _value(config, key)
        new = views_of(int(text)) if key == VIEWS else _value(wanted, key)
        own = [change for change in changes if change.key == key]
        if new == (own[-1].new if own else begun):
            continue
        changes = [change for change in changes if change.key != key or change.step < step]
        old = next((change.new for change in reversed(changes) if change.key == key), begun)
        if new != old:
            changes.append(Change(step, key, old, new))
    changes.sort(key=lambda change: change.step)
    for boundary in {change.step for change in changes}:
        _require_room(config_at(config, changes, boundary), *schedule_at(config, changes, boundary))
    return tuple(changes)


def _require_extensible(epochs: int, wanted: int, step: int, steps_per_epoch: int) -> None:
    """ConfigError, with the reason, if a run of so many `epochs` that is at `step` cannot go on to those `wanted`."""
    if wanted < epochs:
        raise ConfigError(f"{EPOCHS}={wanted}: the run has {epochs} already, and cannot have fewer.")
    if wanted > epochs and step != epochs * steps_per_epoch:
        raise ConfigError(
            f"{EPOCHS} cannot be changed in a run under way: {REASONS[EPOCHS]}. This one is at step {step:,} of "
            f"{epochs * steps_per_epoch:,}. Let it finish first, or start a new run in another directory."
        )


def _require_room(settings: TrainConfig, begin: int, end: int) -> None:
    """ConfigError if the warm-up is longer than the epochs of its schedule; `validate` sees to it where there is one schedule."""
    warmup = settings.optim.warmup_epochs
    if warmup > end - begin:
        raise ConfigError(
            f"optim.warmup_epochs={warmup:g} is more than the {end - begin} epochs of the schedule from {begin} to {end}. Give a "
            "shorter one: --change optim.warmup_epochs=N."
        )


def _require_changeable(config: TrainConfig, key: str) -> None:
    """ConfigError, with the reason, if this is a setting that must stay as it is while a run is under way."""
    first, last = key.split(".")[0], key.split(".")[-1]
    is_weight = first == "objectives" and key.count(".") == 2 and last == "weight"
    if first != "optim" and not is_weight and key in as_overrides(config):
        raise ConfigError(
            f"{key} cannot be changed in a run under way: {REASONS.get(first, 'what the weights have learned depends on it')}. "
            "optim.* and objectives.N.weight can. Start a new run in another directory."
        )


def _value(config: TrainConfig, key: str):
    node = config.to_json()
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, list) else node.get(name)
    return node
