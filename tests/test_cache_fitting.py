"""The quantiser's fit: the statistics of the plain formula, in memory that is bounded."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from teacher_cache import fitting
from teacher_cache.fitting import FIT_MEMORY, FIT_ROWS, FIT_TOKENS, FitPlan, Sample
from teacher_cache.planning import ExtractPlan
from teacher_cache.quantize import COLUMNS, ChannelStatistics
from teacher_cache.race import race, take_visible
from teacher_cache.teachers import TEACHERS

MANY = 1_281_167


def of(teacher: str, layers: str, n_rows: int = MANY, **plan):
    spec = TEACHERS[teacher].spec()
    return ExtractPlan(layers=layers, **plan).store_spec(spec, n_rows), spec


@pytest.mark.parametrize("dim", [1, COLUMNS - 1, COLUMNS, 3 * COLUMNS + 5])
@pytest.mark.parametrize("n", [1, 2, 1001])
def test_statistics_are_those_of_all_channels_at_once(dim, n):
    """Channel by channel or all at once, median and spread are the same to the bit, and the tokens are left as they are."""
    tokens = np.random.default_rng(dim).standard_normal((n, dim)).astype("float32") * np.arange(1, dim + 1, dtype="float32")
    before = tokens.copy()
    found = ChannelStatistics.fit(tokens)
    centre = np.median(tokens, axis=0)
    spread = 1.4826 * np.median(np.abs(tokens - centre), axis=0)
    floor = max(0.1 * float(np.median(spread)), 1e-3)
    np.testing.assert_array_equal(found.centre, centre)
    np.testing.assert_array_equal(found.spread, np.maximum(spread, floor).astype("float32"))
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize("layers", ["last", "last5", "last12", "last24"])
@pytest.mark.parametrize("teacher", ["clip-b16", "clip-l14", "dino-s16"])
def test_no_teacher_takes_more_than_the_bound(teacher, layers):
    """What a fit is said to take is at most the bound; FIT_TOKENS of each row are taken wherever they fit, as for five layers of
    a ViT-B."""
    spec, described = of(teacher, layers)
    plan = FitPlan.of(spec, described, "auto")
    assert plan.n_bytes <= FIT_MEMORY and plan.n_rows == FIT_ROWS and 1 <= plan.n_tokens <= FIT_TOKENS and plan.n_trial >= 1
    assert (plan.n_tokens == FIT_TOKENS) == (len(spec.layers) * described.dim <= 5 * 768)


def test_a_very_wide_teacher_gets_fewer_rows():
    """Where one token of each row is too much, fewer rows are taken; never none."""
    spec, teacher = of("clip-b16", "last12")
    wide = dataclasses.replace(teacher, dim=65536)
    plan = FitPlan.of(spec, wide, "none")
    assert 1 <= plan.n_rows < FIT_ROWS and plan.n_tokens == 1 and plan.n_trial == 0 and plan.n_bytes <= FIT_MEMORY


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_memory_is_what_was_said(dtype, monkeypatch):
    """Sample, trial and all that stands beside them stay within what the plan says; a copy of the sample would not."""
    monkeypatch.setattr(fitting, "SAMPLE_BYTES", 60_000_000)
    spec, teacher = of("demo", "last6", dtype=dtype)
    row = np.random.default_rng(0).standard_normal((len(spec.layers), spec.n_tokens(teacher), teacher.dim), "float32")
    tracemalloc.start()
    sample = Sample(spec, teacher, "auto")
    for number in range(sample.plan.n_rows):
        drawn, whole = sample.places(np.array([number]), None)
        sample.keep(np.array([number]), row[None][:, :, drawn[0]], row[None][: len(whole)])
    statistics, fidelity, _ = sample.fit()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= sample.plan.n_bytes and sample.tokens.nbytes > fitting.BESIDE / 2
    assert [layer.n_tokens for layer in fidelity] == [sample.plan.n_rows * sample.plan.n_tokens] * len(spec.layers)
    assert len(statistics) == (0 if dtype == "float16" else len(spec.layers))


def test_of_visible_tokens_the_kept_ones_are_drawn():
    """A store of visible tokens is fitted on tokens that it keeps, and on a trial of rows as they are kept."""
    spec, teacher = of("demo", "last2", n_rows=40, visible=5)
    sample, rows = Sample(spec, teacher, "auto"), np.arange(3)
    attention = np.random.default_rng(0).random((3, teacher.n_patches), "float32")
    drawn, whole = sample.places(rows, attention)
    tokens = np.arange(teacher.n_tokens, dtype="float32")[None, None, :, None].repeat(3, 0)
    kept = take_visible(tokens, race(attention, rows, 0, 5), 1)[:, 0, :, 0]
    np.testing.assert_array_equal(whole, kept)
    assert all(set(of_row) <= set(of_kept) for of_row, of_kept in zip(drawn, kept, strict=True))
    assert drawn.shape == (3, min(FIT_TOKENS, 6))
