"""student-train --list and --show: what the presets are, without a cache."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import click

from teacher_cache.errors import UsageError

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""


def print_presets(as_json: bool) -> None:
    from pipelines.presets import PRESETS

    about = {name: inspect.getdoc(function).splitlines()[0] for name, function in PRESETS.items()}
    if as_json:
        click.echo(json.dumps(about, indent=1))
        return
    for name, line in about.items():
        click.echo(f"{name:<16} {line}")


def print_preset(preset: str, config, as_json: bool) -> None:
    """What --show prints: a preset's docstring, and its settings as --set takes them."""
    from pipelines.presets import PRESETS

    from ..config import as_overrides

    if as_json:
        about = inspect.getdoc(PRESETS[preset])
        click.echo(json.dumps({"preset": preset, "about": about, "config": config.to_json()}, indent=1))
        return
    click.echo(inspect.getdoc(PRESETS[preset]))
    click.echo("\nSettings (change one with --set KEY=VALUE):")
    for key, value in as_overrides(config).items():
        click.echo(f"  {key}={value}")


def print_rates(preset: str, config, cache: Path | None, as_json: bool) -> None:
    """What --show --rates prints: step as in metrics.jsonl, epochs done by then, learning rate; a line each."""
    from teacher_cache.cache import Cache

    from ..run.rates import learning_rates

    n_images = Cache(cache).n_images if cache else IMAGENET
    steps_per_epoch = n_images // config.batch_size
    if not steps_per_epoch:
        raise UsageError(f"batch_size={config.batch_size} is more than the {n_images:,} images: --set batch_size={n_images}.")
    rates = learning_rates(config, steps_per_epoch)
    if as_json:
        click.echo(json.dumps({"preset": preset, "n_images": n_images, "steps_per_epoch": steps_per_epoch, "rates": rates}))
        return
    lines = (f"{step} {step / steps_per_epoch:.6f} {rate!r}" for step, rate in enumerate(rates, 1))
    click.echo("\n".join(["step epoch rate", *lines]))
