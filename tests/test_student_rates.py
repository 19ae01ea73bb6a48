"""What `student-train --show --rates` prints, against the public schedulers that the methods' code uses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from timm.scheduler.cosine_lr import CosineLRScheduler

from pipelines.presets import recipe
from student import OptimConfig
from student.cli.train import train
from student.run.rates import learning_rate


def show_rates(*arguments) -> str:
    result = CliRunner().invoke(train, ["--show", "--rates", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def printed(*arguments) -> tuple[list[float], int]:
    """The rates of all steps, and the steps of an epoch."""
    shown = json.loads(show_rates("--json", *arguments))
    return shown["rates"], shown["steps_per_epoch"]


@pytest.mark.parametrize("preset", ["mimco-b16", "mimco-swin-t"])
@pytest.mark.parametrize("more", [(), ("--set", "epochs=12", "--set", "optim.warmup_epochs=0")])
def test_mimco_has_simmims_rates(preset, more):
    """MimCo's rates are those that timm's scheduler leaves in the optimizer when SimMIM's loop drives it."""
    rates, steps_per_epoch = printed("--preset", preset, *more)
    epochs, warmup_epochs = (12, 0) if more else (100, 10)
    assert steps_per_epoch == 625 and len(rates) == epochs * 625
    scale = 2048 / 512
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3 * scale)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs * 625, lr_min=5e-6 * scale, warmup_lr_init=5e-7 * scale, warmup_t=warmup_epochs * 625,
        cycle_limit=1, t_in_epochs=False,
    )  # fmt: skip
    expected = []
    for step in range(epochs * 625):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize("preset", ["cae-v2-b16", "cae-v2-l16"])
@pytest.mark.parametrize("warmup", [10, 0])
def test_cae_has_beits_rates(preset, warmup):
    """CAE v2's rates are numpy's linspace from 0 to the peak, both included, and then half a cosine over the other steps."""
    rates, steps_per_epoch = printed("--preset", preset, "--set", f"optim.warmup_epochs={warmup}")
    n_warm, n_all = warmup * steps_per_epoch, 300 * steps_per_epoch
    fall = np.arange(n_all - n_warm)
    cosine = 1e-5 + 0.5 * (1.5e-3 - 1e-5) * (1 + np.cos(math.pi * fall / len(fall)))
    expected = np.concatenate([np.linspace(0, 1.5e-3, n_warm), cosine])
    np.testing.assert_allclose(rates, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("preset", ["mae-b16", "mr-mae-b16", "mr-mcmae-b", "maskalign-b16", "milan-b16"])
def test_forks_of_mae_have_its_rates(preset):
    """All others have MAE's: from 0 to the peak by the epoch, in fractions, and half a cosine over the other epochs."""
    rates, steps_per_epoch = printed("--preset", preset)
    config = recipe(preset).config
    peak, low, warm = config.optim.base_lr * config.batch_size / 256, config.optim.min_lr, config.optim.warmup_epochs
    epoch = np.arange(config.epochs * steps_per_epoch) / steps_per_epoch
    down = low + (peak - low) * 0.5 * (1 + np.cos(math.pi * (epoch - warm) / (config.epochs - warm)))
    np.testing.assert_allclose(rates, np.where(epoch < warm, peak * epoch / warm, down), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("schedule", ["mae", "simmim", "beit"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.2, 1.0, 2.0])
def test_shortest_runs_have_rates(schedule, warmup):
    """Warm-ups of no step, one step, a part of an epoch or the whole run give a rate between 0 and the peak for every step."""
    config = OptimConfig(1e-3, warmup_epochs=warmup, warmup_start=1e-5, schedule=schedule)
    for step in range(20):
        assert 0 < learning_rate(step, 10, 2, 256, config) <= 1e-3


def test_rates_as_text(shared_cache):
    """A line a step, numbered and named as in metrics.jsonl; with --cache an epoch is as long as that cache makes it."""
    text = show_rates("--preset", "mae-b16", "--tiny", "--cache", shared_cache.path)
    lines = text.splitlines()
    assert lines[0] == "step epoch rate" and len(lines) == 1 + 2 * 3
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "0.333333"], ["2", "0.666667"]]
    assert float(lines[2].split()[2]) == pytest.approx(1e-3 / 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "mae-b16", "--rates"], "--rates goes with --show"),
        (["--preset", "mae-b16", "--show", "--rates", "--cache", "CACHE"], "batch_size=4096 is more than the 24 images"),
        (["--preset", "mae-b16", "--set", "optim.schedule=step"], "one of mae, simmim, beit"),
        (["--preset", "mae-b16", "--set", "optim.warmup_start=1"], "optim.warmup_start=1.0 is above the peak rate"),
    ],
)
def test_bad_rates(shared_cache, arguments, message):
    """What cannot be shown is refused in a sentence."""
    result = CliRunner().invoke(train, [str(shared_cache.path) if each == "CACHE" else each for each in arguments])
    assert result.exit_code == 2 and message in result.output, result.output
