"""Maskers: partitions of the grid, drawn by the law they name."""

import typing
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from student_fakes import TEACHER, fake_batch

from student import Batch, ConfigError, MaskConfig, SwinConfig, Targets, TeacherShape, ViTConfig
from student.batch import take
from student.masking import MasksAhead, build_masker, draw_noise
from student.masking.blocks import BlockMasker

BACKBONE = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2)
KINDS = typing.get_args(typing.get_type_hints(MaskConfig)["kind"])


def attention_batch(attention: torch.Tensor) -> Batch:
    return Batch(
        torch.zeros(len(attention), 3, 1, 1),
        torch.arange(len(attention)),
        None,
        (Targets(torch.zeros(0), (), True, attention, None),),
    )


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**6), ratio=st.floats(0, 0.93))
def test_partition(kind, seed, step, ratio):
    """Every masker splits the patches of every image into n_keep visible and all other hidden ones, for any seed."""
    config = MaskConfig(kind, ratio if kind != "unit" else min(ratio, 0.75), min_block=2, unit=8)
    mask = build_masker(config, BACKBONE, (TEACHER,))(fake_batch(range(3)), draw_noise(seed, step, 3, 16))
    assert mask.keep.shape == (3, config.n_keep(BACKBONE))
    both = torch.cat([mask.keep, mask.drop], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(16).expand(3, 16))


@pytest.mark.parametrize("ratio, n_keep", [(0.75, 49), (0.70, 58), (0.60, 78), (0.50, 98)])
def test_n_keep(ratio, n_keep):
    """The number of visible patches of 196 is that of the MAE forks, truncated in float arithmetic."""
    assert MaskConfig(ratio=ratio).n_keep(ViTConfig()) == n_keep


@pytest.mark.parametrize("ratio, n_drop", [(0.15, 30), (0.25, 49), (0.50, 98), (0.60, 118)])
def test_counts_of_cae(ratio, n_drop):
    """CAE v2's ratios hide 30, 49, 98 and 118 of 196 patches, in every image."""
    masker = build_masker(MaskConfig("block", ratio), ViTConfig())
    assert masker(fake_batch(range(3)), draw_noise(0, 0, 3, 196)).drop.shape == (3, n_drop)


@pytest.mark.parametrize("backbone, n_drop", [(ViTConfig(), 120), (SwinConfig(), 30)])
def test_counts_of_mimco(backbone, n_drop):
    """30 of 49 units of 32 pixels are hidden: 120 patches of a ViT, 30 cells of a Swin."""
    mask = build_masker(MaskConfig("unit", 0.6), backbone)(fake_batch(range(3)), draw_noise(0, 0, 3, backbone.n_patches))
    assert mask.drop.shape == (3, n_drop)


def test_units_are_whole():
    """A unit of 2 x 2 patches is kept whole or hidden whole, and all units are hidden equally often."""
    hidden = torch.zeros(4096, 16)
    mask = build_masker(MaskConfig("unit", 0.5, unit=8), BACKBONE)(fake_batch(range(1)), draw_noise(3, 0, 4096, 16))
    hidden.scatter_(1, mask.drop, 1.0)
    units = hidden.reshape(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4, 4)
    assert torch.equal(units.amin(2), units.amax(2))
    shares = units[:, :, 0].mean(0)
    assert ((shares - 0.5).abs() < 4 * (0.25 / 4096) ** 0.5).all()


def test_blocks_reach_every_patch():
    """No patch is never hidden, and those in the middle, which more rectangles reach, are hidden far more often than corners."""
    shares = BlockMasker(98, 16, (14, 14)).draw(np.arange(400, dtype="uint64")).mean(0).reshape(14, 14)
    assert shares.min() > 0 and shares.mean() == 0.5
    assert shares[5:9, 5:9].mean() > 3 * shares[[0, 0, -1, -1], [0, -1, 0, -1]].mean()


def test_blocks_equal_a_loop_over_rectangles():
    """Drawn one crop at a time by a plain loop over the same numbers, masks are the same."""
    from student.masking.blocks import _uniforms

    masker, keys = BlockMasker(98, 16, (14, 14)), np.arange(40, dtype="uint64")
    for key, drawn in zip(keys, masker.draw(keys), strict=True):
        hidden, attempt = np.zeros((14, 14), bool), 0
        while hidden.sum() < 98:
            area, ratio, top, left = (float(u[0]) for u in _uniforms(np.array([key]), attempt))
            attempt += 1
            remaining = 98 - int(hidden.sum())
            area = 16 + area * (remaining - 16)
            aspect = np.exp(np.log(1 / 0.3) + ratio * (np.log(0.3) - np.log(1 / 0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= 14 or width >= 14:
                continue
            top, left = int(top * (14 - height + 1)), int(left * (14 - width + 1))
            tried = hidden.copy()
            tried[top : top + height, left : left + width] = True
            if 0 < tried.sum() - hidden.sum() <= remaining:
                hidden = tried
        assert np.array_equal(hidden.ravel(), drawn)


def test_blocks_are_blocks():
    """Hidden patches hang together far more than when they are drawn one by one."""

    def neighbours(hidden):
        return (hidden[:, :, 1:] & hidden[:, :, :-1]).mean()

    drawn = BlockMasker(98, 16, (14, 14)).draw(np.arange(200, dtype="uint64")).reshape(-1, 14, 14)
    single = np.random.default_rng(0).permuted(drawn.reshape(200, -1), axis=1).reshape(-1, 14, 14)
    assert neighbours(drawn) > 1.5 * neighbours(single)


def test_restore_undoes_the_shuffle():
    """Visible and hidden tokens put together and taken by `restore` are the tokens in image order."""
    batch = fake_batch(range(2))
    mask = build_masker(MaskConfig("random", 0.7), BACKBONE)(batch, draw_noise(0, 0, 2, 16))
    patches = batch.targets[0].patches(-1)
    shuffled = torch.cat([take(patches, mask.keep), take(patches, mask.drop)], dim=1)
    assert torch.equal(take(shuffled, mask.restore), patches)


def test_random_keeps_the_smallest_noise():
    """The random masker is MAE's: the first patches of the argsort of uniform noise."""
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3] * 4])
    noise += torch.arange(16) * 1e-3
    mask = build_masker(MaskConfig("random", 0.75), BACKBONE)(fake_batch(range(1)), noise)
    assert mask.keep.tolist() == [[1, 5, 9, 13]]


def test_attention_race_is_multinomial_without_replacement():
    """The pairs that the attention race keeps of 4 patches occur as often as successive weighted draws give them."""
    attention = [0.5, 0.25, 0.2, 0.05]
    n_draws = 20_000
    masker = build_masker(
        MaskConfig("attention", 0.5),
        ViTConfig(image_size=32, dim=8, depth=1, heads=1),
        (TeacherShape("t", (2, 2), 8, 1, True, True, None),),
    )
    noise = draw_noise(7, 0, n_draws, 4)
    keep = masker(attention_batch(torch.tensor([attention]).expand(n_draws, 4)), noise).keep

    chi_square = 0.0
    for first, second in permutations(range(4), 2):  # the order matters: it is the order of the draws
        expected = n_draws * attention[first] * attention[second] / (1 - attention[first])
        seen = int(((keep[:, 0] == first) & (keep[:, 1] == second)).sum())
        chi_square += (seen - expected) ** 2 / expected
    assert chi_square < 31.3  # 99.9 % quantile for 11 degrees of freedom

    wrong = [0.25] * 4
    uniform = masker(attention_batch(torch.tensor([wrong]).expand(n_draws, 4)), noise).keep
    assert abs((uniform == 0).any(dim=1).float().mean() - 0.5) < 0.02


def test_patches_without_attention_come_last():
    """Patches of zero attention are kept only when all others are, and raise nothing."""
    attention = torch.zeros(8, 16)
    attention[:, [3, 11]] = 0.5
    mask = build_masker(MaskConfig("attention", 0.75), BACKBONE, (TEACHER,))(attention_batch(attention), draw_noise(0, 0, 8, 16))
    assert torch.equal(mask.keep[:, :2].sort(dim=1).values, torch.tensor([3, 11]).expand(8, 2))


def test_attention_top_ignores_the_noise():
    """The deterministic masker keeps the patches of most attention, most first."""
    attention = torch.arange(16.0)[None]
    masker = build_masker(MaskConfig("attention-top", 0.75), BACKBONE, (TEACHER,))
    assert masker(attention_batch(attention), torch.rand(1, 16)).keep.tolist() == [[15, 14, 13, 12]]


def test_noise_is_a_function_of_seed_and_step():
    """The noise of a step is the same whenever it is drawn, differs between steps and seeds, and is never 0 or 1."""
    noise = draw_noise(3, 5, 64, 196)
    assert torch.equal(noise, draw_noise(3, 5, 64, 196))
    assert not torch.equal(noise, draw_noise(3, 6, 64, 196))
    assert not torch.equal(noise, draw_noise(4, 5, 64, 196))
    assert noise.min() > 0 and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "teachers, words",
    [
        ((), "no teacher"),
        ((TeacherShape("gap", (4, 4), 12, 3, False, False, None),), "gap gives none"),
        ((TeacherShape("fine", (8, 8), 12, 3, True, True, None),), r"4 x 4 patches \(.*fine has 8 x 8\. A student of 32 px"),
    ],
    ids=["no teacher", "no attention", "other grid"],
)
def test_attention_must_be_there(teachers, words):
    """A masker that looks at attention refuses a teacher that cannot give it, and says what is there."""
    with pytest.raises(ConfigError, match=words):
        build_masker(MaskConfig("attention"), BACKBONE, teachers)


@pytest.mark.parametrize("kind", ["random", "attention", "attention-top"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_masks_ahead_are_those_of_the_student(kind, place):
    """Drawn by numpy before the tokens are read, masks are to the bit those that the masker draws of the whole batch."""
    masker = build_masker(MaskConfig(kind, 0.75), BACKBONE, (TEACHER,))
    attention = torch.rand(4 * 256, 16, generator=torch.Generator().manual_seed(0)).softmax(1)
    attention[::3, ::2] = attention[::3, :1]  # ties
    attention[1::5, 3:9] = 0
    masks = [masker(attention_batch(attention), draw_noise(5, step, len(attention), 16)) for step in (0, 7)]
    ahead = MasksAhead(masker, seed=5, n_patches=16)
    own = slice(place * 256, (place + 1) * 256)
    for step, mask in zip((0, 7), masks, strict=True):
        drawn = masker.mask(torch.from_numpy(ahead.order(step, len(attention), place, 4, attention[own].numpy())))
        assert torch.equal(drawn.keep, mask.keep[own]) and torch.equal(drawn.drop, mask.drop[own])
    assert kind == "attention-top" or not torch.equal(masks[0].keep, masks[1].keep)
