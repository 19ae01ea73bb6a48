"""Coding by a transform as values: bytes, codes, what is read of them, and the fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from fakes import FakeTeacher
from klt_fakes import DIM, LAYERS, fitted, residual_stream, spec_of

from teacher_cache.encoding.fit import SampleSize, fit_bytes, least_rows
from teacher_cache.encoding.klt_encode import TransformEncoder
from teacher_cache.encoding.klt_fit import lloyd_max
from teacher_cache.errors import CacheCorruptError, UsageError
from teacher_cache.format.dtypes import dtype_of, klt_bits
from teacher_cache.format.quantize import token_errors
from teacher_cache.format.spec import ARRAY_NAME
from teacher_cache.format.transform import DISTORTION, ESCAPED, decode, layers_together, least_tokens, token_bytes, unpack, values

CPU = torch.device("cpu")


def encoded(tokens: np.ndarray, dtype: str = "klt:3.2", group: int | None = None) -> dict[int, np.ndarray]:
    """Block number -> uint8 [n, bytes of a token], of float32 [L, n, D]."""
    spec, transform, statistics = fitted(dtype, group)
    arrays = TransformEncoder(spec, transform, statistics, CPU)(torch.from_numpy(tokens)[None])
    return {layer: arrays[ARRAY_NAME.format(layer)][0].numpy() for layer in spec.layers}


def read_again(stored: dict[int, np.ndarray], dtype: str = "klt:3.2", group: int | None = None) -> np.ndarray:
    """float32 [L, n, D]"""
    spec, transform, _ = fitted(dtype, group)
    behind = {layer: spec.read_with(layer) for layer in spec.layers}
    return np.stack([decode([stored[other] for other in behind[layer]], behind[layer], transform) for layer in spec.layers])


def errors_of(tokens: np.ndarray, dtype: str = "klt:3.2", group: int | None = None) -> np.ndarray:
    """float64 [L, n]: the standardised error of each token."""
    read, statistics = read_again(encoded(tokens, dtype, group), dtype, group), fitted(dtype, group)[2]
    return np.stack([token_errors(tokens[i], read[i], statistics[layer]) for i, layer in enumerate(LAYERS)])


@pytest.mark.parametrize(("given", "spelled"), [("klt", "klt:3.2"), ("klt:3.0", "klt:3"), ("klt:6.00", "klt:6"),
                                                ("klt:2.25", "klt:2.25"), ("int8", "int8")])  # fmt: skip
def test_one_spelling(given, spelled):
    """A number of bits has one spelling in a store, however it was given."""
    assert dtype_of(given) == spelled and dtype_of(spelled) == spelled
    assert spec_of(given).dtype == spelled


@pytest.mark.parametrize("given", ["klt:0.5", "klt:6.5", "klt:", "klt:x", "klt:3.123", "klt:-1", "klt:7", "KLT:3", "klt3"])
def test_bits_out_of_range(given):
    """A sentence says what would be right."""
    with pytest.raises(UsageError, match="klt:BITS"):
        dtype_of(given)


def test_bytes_of_a_token():
    """They follow from bits and width alone, the scale's byte among them, and are never more than was asked for."""
    assert [token_bytes(f"klt:{bits}", 768) for bits in ("1", "3.2", "3.25", "6")] == [96, 307, 312, 576]
    assert klt_bits("klt:3.2") == 3.2 and klt_bits("int8") is None
    assert spec_of("klt:3.2").row_shape("tokens/05", FakeTeacher().spec) == (17, 9)
    with pytest.raises(UsageError, match="no byte is left"):
        token_bytes("klt:1", 8)
    assert [layers_together(dim) for dim in (384, 768, 1024, 5120)] == [13, 6, 5, 1]
    with pytest.raises(UsageError, match="width 5121; a transform takes up to 5120"):
        layers_together(5121)


@pytest.mark.parametrize(("group", "together"), [(5, {4: (6, 5, 4), 5: (6, 5), 6: (6,)}), (2, {4: (4,), 5: (6, 5), 6: (6,)}),
                                                 (1, {4: (4,), 5: (5,), 6: (6,)})])  # fmt: skip
def test_which_codes_are_read(group, together):
    """The last layer is read alone, an earlier one with those behind it in its group; groups are counted from the end."""
    spec = spec_of(group=group)
    assert {layer: spec.read_with(layer) for layer in LAYERS} == together
    assert spec.arrays_read([6], True) == ["tokens/06", "attention"]
    assert spec.arrays_read([4], False) == [ARRAY_NAME.format(layer) for layer in sorted(together[4])]
    assert spec_of("int8").read_with(4) == (4,)


@pytest.mark.parametrize(("dtype", "group"), [("klt:1.5", None), ("klt:3.2", None), ("klt:3.2", 2), ("klt:6", 1)])
def test_codes_are_the_oracles(dtype, group):
    """Given the same values behind, the numpy oracle has the same codes; where rounding decides, the next one at most."""
    spec, transform, statistics = fitted(dtype, group)
    tokens, stored = residual_stream(300, seed=1), encoded(residual_stream(300, seed=1), dtype, group)
    for place, layer in enumerate(LAYERS):
        code = transform.layers[layer]
        behind = [values(stored[other], transform.layers[other], transform) for other in spec.read_with(layer)[:-1]]
        behind = np.concatenate([np.zeros((300, 0), "float32"), *behind], 1)
        plain = oracles.klt_encode(oracles.klt_components(tokens[place], code, statistics[layer], behind), code, transform)
        assert plain.shape == stored[layer].shape == (300, token_bytes(dtype, DIM)) and plain.dtype == stored[layer].dtype
        fits = stored[layer][:, 0] < ESCAPED
        plain, codes = plain[fits], stored[layer][fits]
        assert (plain == codes).all(1).mean() > 0.98 and fits.mean() > (0.6 if dtype == "klt:1.5" else 0.99)
        steps = np.abs(unpack(plain, code.bits) - unpack(codes, code.bits))[plain[:, 0] == codes[:, 0]]
        assert steps.max() <= 1 and unpack(codes, code.bits).max() < 2 ** code.bits.max()


@pytest.mark.parametrize("dtype", ["klt:1.5", "klt:3.2", "klt:6"])
def test_compiled_codes_are_those_of_a_gpu(dtype):
    """The loop that codes on a CPU has the codes of torch's operations, which code on other devices, on edges too."""
    spec, transform, statistics = fitted(dtype, None)
    tokens = torch.from_numpy(np.concatenate([residual_stream(200, seed=2), 30 * residual_stream(9, seed=3)], 1))[None]
    encoder = TransformEncoder(spec, transform, statistics, CPU)
    codings = [coding for layer in encoder.layers.values() for coding in (layer.by_basis, layer.by_itself)]
    given = []
    for coding in codings:
        edges = torch.cat([run[3][-1:].expand(run[0].stop - run[0].start) for run in coding.runs])
        given.append(torch.stack([edges, -edges, edges.nextafter(torch.tensor(9.0)), 1e9 * edges, torch.randn(len(edges))])[None])
    n_bits = next(iter(encoder.layers.values())).n_bits
    compiled = encoder(tokens), [coding.codes(values, n_bits) for coding, values in zip(codings, given, strict=True)]
    for coding in codings:
        coding.tables = None
    plain = encoder(tokens), [coding.codes(values, n_bits) for coding, values in zip(codings, given, strict=True)]
    assert all(torch.equal(compiled[0][array], plain[0][array]) for array in plain[0])
    assert all(
        torch.equal(a, b) for ours, theirs in zip(compiled[1], plain[1], strict=True) for a, b in zip(ours, theirs, strict=True)
    )


def test_more_bits_are_nearer():
    """Each bit more nearly halves the error, and at 3.2 bits it is what the spectrum of these tokens lets one hope for."""
    tokens = residual_stream(1000, seed=2)
    medians = {bits: np.median(errors_of(tokens, f"klt:{bits}")) for bits in ("1.5", "3.2", "4.2", "6")}
    assert medians["1.5"] > 2 * medians["3.2"] > 3 * medians["4.2"] > 4.5 * medians["6"] and medians["3.2"] < 0.09


def test_layers_help_each_other():
    """Coded together, earlier layers are nearer than each by itself; the last one is as near."""
    tokens = residual_stream(1000, seed=3)
    together, alone = (np.median(errors_of(tokens, "klt:3.2", group), 1) for group in (None, 1))
    assert (together[:2] < 0.75 * alone[:2]).all() and together[2] == pytest.approx(alone[2], rel=0.05)


@pytest.mark.parametrize("factor", [50.0, 0.5])
def test_tokens_of_another_size_are_kept(factor):
    """A token fifty times as large as others, or half, has the same relative error: the scale is the token's own."""
    _, _, statistics = fitted()
    tokens, centre = residual_stream(200, seed=4), np.stack([statistics[layer].centre for layer in LAYERS])[:, None]
    errors = errors_of((tokens - centre) * np.float32(factor) + centre)
    assert np.median(errors) < 0.12 and errors.max() < 0.5


@pytest.mark.parametrize("dtype", ["klt:2", "klt:3.2", "klt:5"])
def test_tokens_that_the_basis_does_not_fit(dtype):
    """Those of another direction, and with a channel far beyond the others, are coded by themselves, and not lost. Those beside
    them are what they were; and what the transform was made for is hardly ever coded so."""
    _, transform, statistics = fitted(dtype)
    rng, ordinary = np.random.default_rng(6), residual_stream(200, seed=7)
    odd = 10 * rng.standard_normal((3, 100, DIM))
    spread, centre = (np.stack([getattr(statistics[i], which) for i in LAYERS])[:, None] for which in ("spread", "centre"))
    spiked = ordinary[:, :100].copy()
    spiked[:, :, 20] += 50 * spread[:, :, 20]
    for tokens, most in (((odd * spread + centre).astype("float32"), {"klt:2": 0.75, "klt:3.2": 0.45, "klt:5": 0.2}[dtype]),
                         (spiked, {"klt:2": 1.0, "klt:3.2": 0.6, "klt:5": 0.3}[dtype])):  # fmt: skip
        errors, stored = errors_of(tokens, dtype), encoded(tokens, dtype)
        assert np.median(errors) < most and errors.max() < 1.2
        assert tokens is spiked or (stored[6][:, 0] >= ESCAPED).mean() > 0.5
        both = np.concatenate([ordinary, tokens], 1)
        assert all(np.mean(encoded(both, dtype)[layer][:200] == encoded(ordinary, dtype)[layer]) > 0.999 for layer in LAYERS)
    assert all((codes[:, 0] >= ESCAPED).mean() < 0.02 for codes in encoded(ordinary, dtype).values())


def test_no_token_begins_with_the_fill_value():
    """Not even one that is the mean itself, or zero, or far beyond the largest scale: and all of them are read again finite."""
    _, transform, _ = fitted()
    odd = np.stack([np.stack([transform.layers[layer].mean, np.zeros(DIM), np.full(DIM, 1e8), np.full(DIM, -1e8)])
                    for layer in LAYERS]).astype("float32")  # fmt: skip
    stored = encoded(odd)
    assert all((codes[:, 0] > 0).all() for codes in stored.values())
    assert np.isfinite(read_again(stored)).all()


def test_codes_do_not_depend_on_where_a_token_stands():
    """A token's codes are a function of the token: in another order, the same bytes."""
    tokens = residual_stream(64, seed=5)
    there, back = encoded(tokens), encoded(np.ascontiguousarray(tokens[:, ::-1]))
    assert all(np.mean(there[layer] == back[layer][::-1]) > 0.999 for layer in LAYERS)


def test_levels():
    """Those of Max (1960) for a normal variable, and the error they leave."""
    levels = lloyd_max()
    assert np.allclose(levels[:2], [-0.7979, 0.7979], atol=1e-4) and np.allclose(levels[4:6], [0.4528, 1.5104], atol=1e-4)
    values = np.random.default_rng(0).standard_normal(100_000)
    for bits in (1, 2, 3, 4, 6, 8, 10):
        table = levels[2**bits - 2 : 2 ** (bits + 1) - 2]
        off = values - table[np.searchsorted((table[1:] + table[:-1]) / 2, values)]
        assert (off**2).mean() == pytest.approx(DISTORTION[bits], rel=0.05)


def test_a_transform_is_used_up():
    """All bits of a token's bytes are codes; components are in the order of their bits."""
    for dtype in ("klt:1.5", "klt:3.2", "klt:6"):
        _, transform, _ = fitted(dtype)
        transform.require_sound(token_bytes(dtype, DIM), "store")


def damaged(part: str):
    _, transform, _ = fitted()
    code = transform.layers[5]
    scales, levels, bits, basis = transform.scales.copy(), transform.levels.copy(), code.bits.copy(), code.basis.copy()
    if part == "scales":
        scales[7] = -1
    elif part == "levels":
        levels[3] = levels[2]
    elif part == "bits":
        bits[0] += 1
    elif part == "order":
        bits[[0, -1]] = bits[[-1, 0]]
    elif part == "basis":
        basis[-DIM] = 0
    layers = {**transform.layers, 5: replace(code, bits=bits, basis=basis)}
    return replace(transform, layers=layers, scales=scales, levels=levels)


@pytest.mark.parametrize(("part", "said"), [("scales", "not positive"), ("levels", "do not ascend"), ("order", "bits of layer 5"),
                                            ("bits", "layer 5 has codes of"), ("basis", "a row of zeros")])  # fmt: skip
def test_a_transform_that_cannot_be(part, said):
    """Bits, levels, scales and basis are looked at before anything is read with them."""
    with pytest.raises(CacheCorruptError, match=said):
        damaged(part).require_sound(token_bytes("klt:3.2", DIM), "store")


def test_the_sample():
    """At least 20 tokens a channel of all layers together, of many crops if there are, and further rows to measure on."""
    teacher = replace(FakeTeacher().spec, dim=768, grid=(14, 14))
    layers = (2, 3, 4, 5, 6)
    codecs = tuple((ARRAY_NAME.format(layer), "none") for layer in layers)
    spec = replace(spec_of(), layers=layers, codecs=codecs, attention=False)
    assert least_tokens(5, 768) == 76_800
    large, small = (SampleSize.of(replace(spec, n_rows=n), teacher) for n in (1_281_167, 500))
    assert large == SampleSize(4096, 32, 256) and small.n_rows * small.n_tokens >= 76_800 and small.all_rows <= 500
    n = least_rows(spec, teacher)
    assert SampleSize.of(replace(spec, n_rows=n), teacher).n_tokens == 197
    assert fit_bytes(replace(spec, n_rows=n), teacher) == 4 * 5 * n * 197 * 768
    with pytest.raises(UsageError, match="fitted on at least 76,800 tokens; 400 images have .* to fit on. Give"):
        SampleSize.of(replace(spec, n_rows=400), teacher)
    assert SampleSize.of(replace(spec_of("int8"), n_rows=100_000), FakeTeacher().spec) == SampleSize(2048, 17)
