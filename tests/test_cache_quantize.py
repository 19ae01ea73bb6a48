"""The quantisers: their error bounds, and features that would break a careless one."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from teacher_cache.encoding.encode import quantise_on_host as quantise
from teacher_cache.format.quantize import GROUPS, LEAST_SPREAD, ChannelStatistics, dequantise, token_errors, unpack


def features(n=512, dim=256, seed=0):
    """Whitened tokens as a ViT's: channels of very different spread and centre, a few outlier channels, long tails."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_t(5, (n, dim)) * rng.lognormal(0, 0.7, dim) + rng.normal(0, 1, dim)
    tokens[:, 7] += 60
    tokens[:, 130] *= 40
    tokens -= tokens.mean(1, keepdims=True)
    return (tokens / tokens.std(1, keepdims=True)).astype("float32")


def round_trip(tokens, statistics, group=128):
    q, scale = quantise(tokens, statistics, "int8", group)
    assert q.dtype == np.int8 and q.min(initial=0) >= -127 and scale.dtype == np.float16 and np.isfinite(scale).all()
    assert scale.shape == (*tokens.shape[:-1], -(-tokens.shape[-1] // group))
    return q, scale, dequantise(q, scale, statistics, "int8", group)


def bound(tokens, scale, statistics, group):
    """What the module's docstring promises: half a step, and float16's rounding of the scale at the far end.

    Scales below float16's normal range (2**-14) are rounded to a multiple of 2**-24. The last term is float32 arithmetic.
    """
    step = np.repeat(scale.astype("float64"), group, axis=-1)[..., : tokens.shape[-1]]
    largest = 127 * np.maximum(step * 2**-11, 2**-25)
    rounding = 4e-7 * (np.abs(tokens).astype("float64") + np.abs(statistics.centre) + 127 * step * statistics.spread)
    return np.maximum(step / 2, largest) * statistics.spread * (1 + 1e-3) + rounding


values = hnp.arrays("float32", st.tuples(st.integers(1, 6), st.integers(1, 40)), elements=st.floats(-64, 64, width=32))


@given(values, values, st.sampled_from([1, 3, 8, 128]))
def test_error_bound(fitted, tokens, group):
    """For any tokens, also others than those it was fitted on, the error of every value is within the stated bound."""
    dim = min(fitted.shape[1], tokens.shape[1])
    statistics, tokens = ChannelStatistics.fit(fitted[:, :dim]), tokens[:, :dim]
    _, scale, back = round_trip(tokens, statistics, group)
    assert (np.abs(back.astype("float64") - tokens) <= bound(tokens, scale, statistics, group)).all()


def test_error_on_vit_like_features():
    """On features with outlier channels the standardised error of the median token is below 1 %, of any token below 5 %."""
    tokens = features()
    statistics = ChannelStatistics.fit(tokens)
    errors = token_errors(tokens, round_trip(tokens, statistics)[2], statistics)
    assert 1e-3 < np.median(errors) < 0.01 and errors.max() < 0.05


# --- int4 --------------------------------------------------------------------------------------------------------------


def round_trip_4(tokens, statistics, group=GROUPS["int4"]):
    stored, scale = quantise(tokens, statistics, "int4", group)
    assert stored.dtype == np.uint8 and stored.shape == (*tokens.shape[:-1], -(-tokens.shape[-1] // 2))
    assert scale.dtype == np.float16 and np.isfinite(scale).all()
    return stored, scale, dequantise(stored, scale, statistics, "int4", group)


@given(values, values, st.sampled_from([1, 2, 3, 16]))
def test_error_bound_of_int4(fitted, tokens, group):
    """The error is at most half a step, or one for a value of the other sign beyond the last level; no row is all 0."""
    dim = min(fitted.shape[1], tokens.shape[1])
    statistics, tokens = ChannelStatistics.fit(fitted[:, :dim]), tokens[:, :dim]
    stored, scale, back = round_trip_4(tokens, statistics, group)
    step = np.abs(np.repeat(scale.astype("float64"), group, axis=-1)[..., :dim])
    largest = 8 * np.maximum(step * 2**-10, 2**-24)
    rounding = 4e-7 * (np.abs(tokens).astype("float64") + np.abs(statistics.centre) + 8 * step * statistics.spread)
    assert (np.abs(back.astype("float64") - tokens) <= (step + largest) * statistics.spread * (1 + 1e-3) + rounding).all()
    assert stored.any(-1).all()


def test_levels_of_int4():
    """The largest magnitude becomes -8; a group of nothing else becomes 7; the even channel is in the low half of a byte."""
    statistics = ChannelStatistics(np.zeros(4, "float32"), np.ones(4, "float32"))
    tokens = np.array([[8, -3, 0, 1], [-8, 7, 2, -1], [4, 4, 4, 4], [0, 0, 0, 0]], "float32")
    stored, scale, back = round_trip_4(tokens, statistics, 4)
    assert unpack(stored, 4).tolist() == [[-8, 3, 0, -1], [-8, 7, 2, -1], [7, 7, 7, 7], [0, 0, 0, 0]]
    assert scale.ravel() == pytest.approx([-1, 1, 4 / 7, 0], rel=1e-3) and back == pytest.approx(tokens, abs=2e-3)
    assert stored[0].tolist() == [(3 + 8) << 4 | 0, (-1 + 8) << 4 | 8]


def test_packing():
    """What is packed comes back, also an odd number of channels, whose last byte is filled up with 15."""
    levels = np.random.default_rng(0).integers(-8, 8, (5, 7)).astype("int8")
    packed = oracles.pack(levels)
    assert np.array_equal(unpack(packed, 7), levels) and (packed[:, -1] >> 4 == 15).all()


def test_error_of_int4_on_gaussian_tokens():
    """In groups of 16 channels the standardised error of the median Gaussian token is below 8 %."""
    tokens = np.random.default_rng(0).standard_normal((512, 768)).astype("float32")
    statistics = ChannelStatistics.fit(tokens)
    errors = token_errors(tokens, round_trip_4(tokens, statistics)[2], statistics)
    assert 0.05 < np.median(errors) < 0.08


# --- on a device ---------------------------------------------------------------------------------------------------------


@given(values, values, st.sampled_from(["int8", "int4"]), st.sampled_from([1, 2, 3, 16, 128]))
def test_on_the_device_it_is_the_same(fitted, tokens, dtype, group):
    """torch quantises to the very numbers that numpy does, so that a store's bytes do not depend on where it was done."""
    dim = min(fitted.shape[1], tokens.shape[1])
    statistics, tokens = ChannelStatistics.fit(fitted[:, :dim]), np.ascontiguousarray(tokens[:, :dim])
    expected, ours = (law(tokens, statistics, dtype, group) for law in (oracles.quantise, quantise))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --- features that would break a careless one ----------------------------------------------------------------------------


def test_a_massive_channel_damages_only_its_group():
    """A token with one huge value keeps full precision in the other groups of channels."""
    tokens = features()
    statistics = ChannelStatistics.fit(tokens)
    before = np.abs(round_trip(tokens, statistics)[2] - tokens)
    massive = tokens.copy()
    massive[3, 200] = 500
    after = np.abs(round_trip(massive, statistics)[2] - massive)
    assert np.array_equal(after[:, :128], before[:, :128]) and after[3, 128:].mean() > 3 * before[3, 128:].mean()


def test_statistics():
    """Centre is the median, spread 1.4826 MAD, and no spread is below a tenth of the median spread."""
    tokens = np.random.default_rng(0).normal(5, 2, (20001, 9)).astype("float32")
    tokens[:, 8] = 3
    statistics = ChannelStatistics.fit(tokens)
    assert np.abs(statistics.centre[:8] - 5).max() < 0.05 and np.abs(statistics.spread[:8] - 2).max() < 0.05
    assert statistics.centre[8] == 3 and statistics.spread[8] == pytest.approx(0.1 * np.median(statistics.spread), rel=0.02)
    assert statistics.centre.dtype == statistics.spread.dtype == np.float32


SURVIVORS = {
    "dead channel": lambda t: t * (np.arange(256) != 5),
    "sparse channel": lambda t: np.where((np.arange(256) == 5) & (np.arange(512) % 10 > 0)[:, None], 0, t),
    "all zero": lambda t: t * 0,
    "constant": lambda t: t * 0 + 0.7,
    "one token": lambda t: t[:1],
    "one channel": lambda t: t[:, :1] * 0,
    "massive token": lambda t: np.where(np.arange(512)[:, None] == 9, t * 50, t),
    "tiny": lambda t: t * 1e-20,
    "subnormal": lambda t: t * 1e-42,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", SURVIVORS)
def test_awkward_features(case):
    """Dead, sparse, constant and massive features survive the round trip: finite, no warning, within the bound."""
    tokens = SURVIVORS[case](features()).astype("float32")
    statistics = ChannelStatistics.fit(tokens)
    assert (statistics.spread >= LEAST_SPREAD * 0.999).all()
    assert np.isfinite(round_trip_4(tokens, statistics)[2]).all()
    _, scale, back = round_trip(tokens, statistics)
    assert np.isfinite(back).all() and np.isfinite(token_errors(tokens, back, statistics)).all()
    assert (np.abs(back - tokens) <= bound(tokens, scale, statistics, 128)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dim", [24, 768, 4096])
def test_the_largest_whitened_value(dim):
    """A whitened token that is all in one channel, sqrt(D), against features that never moved: the scale stays finite."""
    tokens = np.zeros((2, dim), "float32")
    tokens[0, 3] = dim**0.5
    _, scale, back = round_trip(tokens, ChannelStatistics.fit(np.zeros((9, dim))))
    assert back[0, 3] == pytest.approx(dim**0.5, rel=1e-3) and np.count_nonzero(back) == 1


def test_smallest_scales():
    """Below float16's range the scale becomes 0 and the value its centre, without a division by zero."""
    statistics = ChannelStatistics(np.full(4, 2.0, "float32"), np.ones(4, "float32"))
    q, scale, back = round_trip(np.full((1, 4), 2 + 2e-6, "float32"), statistics)
    assert not q.any() and not scale.any() and (back == 2).all()


def test_full_range_is_used():
    """The largest value of a group becomes 127 or -127, never -128, which marks holes in a store."""
    tokens = np.concatenate([features(), -features(seed=1)])
    q, _ = quantise(tokens, ChannelStatistics.fit(tokens), "int8", 128)
    groups = np.abs(q.reshape(len(q), 2, 128).astype(int)).max(-1)
    assert groups.min() >= 126 and groups.max() == 127 and (q == -127).any()


def test_leading_shape_does_not_matter():
    """Quantising [B, T, D] gives what its rows give one by one."""
    tokens = features().reshape(8, 64, 256)
    statistics = ChannelStatistics.fit(tokens.reshape(-1, 256))
    whole, single = quantise(tokens, statistics, "int8", 128), [quantise(row, statistics, "int8", 128) for row in tokens]
    assert all(np.array_equal(whole[k], np.stack([one[k] for one in single])) for k in (0, 1))


def test_token_errors():
    """The error is relative, measured in standardised channels, 0 for an exact token and 0 / 0."""
    statistics = ChannelStatistics(np.array([1.0, 0.0], "float32"), np.array([1.0, 100.0], "float32"))
    true = np.array([[4.0, 400.0], [1.0, 0.0], [4.0, 400.0]])
    stored = np.array([[4.0, 400.0], [1.0, 0.0], [4.0, 500.0]])
    assert token_errors(true, stored, statistics) == pytest.approx([0, 0, 1 / 5])
