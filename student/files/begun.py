"""How a run goes on that was begun before its preset, or the program, was what it is now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ..config import TrainConfig, as_overrides, keeping
from ..errors import RunError
from .checkpoint import latest_checkpoint, recorded_config, recorded_description
from .run_directory import CONFIG, read_description


def as_begun(
    out_dir: Path, config: TrainConfig, given: Collection[str], former: Mapping[str, object]
) -> tuple[TrainConfig, list[str]]:
    """`config` as the run in `out_dir` was begun with it, and lines that say what differs from what it would be begun with now.

    Only two kinds of settings are kept: those that came later than the run (ADDED_LATER), and those that its preset corrected
    since (`former`: dotted name -> JSON value before). All others are compared as ever when the run is opened.
    given: dotted names of settings that the user asks for; they are left as they are, and a difference is refused there.
    A directory that holds no run, or one that cannot be read, changes nothing here.
    """
    record = _record(Path(out_dir))
    kept_config, kept = keeping(config, record, former, given) if record is not None else (config, [])
    was, now = as_overrides(kept_config), as_overrides(config)
    lines = [f"{name}={was[name]}, as the run was begun; a new one takes {name}={now[name]}" for name in kept]
    return kept_config, lines


def recorded_init(out_dir: Path) -> tuple[dict, bool] | None:
    """What the run in `out_dir` says its encoder began from (see `exports.initial.begin`), and whether it has a checkpoint.

    None if there is no run, or none that can be read, of which going on with it says more.
    """
    newest = latest_checkpoint(out_dir)
    if newest is not None:
        description = recorded_description(newest)
        return (description.init, True) if description else None
    try:
        init = read_description(out_dir).get("init", {})
    except (RunError, OSError):
        return None
    return (init if isinstance(init, dict) else {}), False


def _record(out_dir: Path) -> dict | None:
    """What the run in a directory says of its configuration, if it can be read: config.json, else its newest checkpoint."""
    if not out_dir.is_dir():
        return None
    try:
        if (out_dir / CONFIG).exists():
            return read_description(out_dir)["config"]
        newest = latest_checkpoint(out_dir)
        return recorded_config(newest) if newest else None
    except (RunError, OSError):
        return None
