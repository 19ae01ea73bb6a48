"""Learning rates and weight decay."""

import pytest
import torch
from student_fakes import TEACHER, tiny_config

from student import AlignConfig, OptimConfig, PredictorConfig, ReconstructConfig, Student
from student.run.optim import build_optimizer
from student.run.rates import learning_rate

SCHEDULE = OptimConfig(1.5e-4, warmup_epochs=20, min_lr=1e-5)


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0.0), (5, 1.5e-6), (1000, 3e-4), (2000, 6e-4), (11_000, (6e-4 + 1e-5) / 2), (20_000, 1e-5)],
)
def test_schedule(step, expected):
    """200 epochs of 100 steps: linear from 0 to 6e-4 over 20 epochs, half way down at epoch 110, min_lr at the end."""
    assert learning_rate(step, 100, 200, 1024, SCHEDULE) == pytest.approx(expected, abs=1e-12)


def test_schedule_quarter():
    """A quarter of the way down the cosine the rate is min + (peak - min) * (1 + cos(pi / 4)) / 2."""
    expected = 1e-5 + (6e-4 - 1e-5) * (1 + 2**-0.5) / 2
    assert learning_rate(6500, 100, 200, 1024, SCHEDULE) == pytest.approx(expected)


def test_no_warmup():
    """Without warm-up the first step has the peak rate."""
    assert learning_rate(0, 100, 2, 256, OptimConfig(1e-3, warmup_epochs=0)) == 1e-3


def test_weight_decay_groups():
    """Decay spares biases, norms and MaskAlign's mixing weights, not CLS and mask token; frozen positions are left out."""
    student = Student(
        tiny_config(objectives=(AlignConfig(levels=2), ReconstructConfig(decoder=PredictorConfig(dim=8, depth=1, heads=2)))),
        (TEACHER,),
    )
    optimizer = build_optimizer(student, OptimConfig())
    names = {parameter: name for name, parameter in student.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in optimizer.param_groups)

    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    matrices = {name for name, p in student.named_parameters() if p.ndim > 1}
    spared = {"objectives.align.mixing"}
    assert {"backbone.cls_token", "objectives.reconstruct.decoder.mask_token"} <= decayed
    assert decayed == matrices - spared - {"backbone.pos_embed"}
    assert plain == set(names.values()) - decayed - {"backbone.pos_embed"}


def test_adamw_settings():
    """Betas come from the config."""
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimConfig(betas=(0.9, 0.98)))
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)
