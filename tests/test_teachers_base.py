"""What all teachers share: whitening, the CLS map, position tables, checks of what goes in, the table of names."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from teacher_fakes import crops_u8

from teacher_cache import device
from teacher_cache.errors import BadInputError, UnknownNameError, UsageError
from teacher_cache.extraction.make import make_cache
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.base import RESIZE, Teacher, activation_name, whiten
from teacher_cache.teachers.blocks.positions import OURS
from teacher_cache.teachers.weights import load
from teacher_cache.teachers.weights.files import STAND_INS


@pytest.fixture(scope="module")
def tiny():
    return load_teacher("demo", "random:0")


def test_whitening_is_per_token_with_biased_variance_and_eps():
    """Whitened tokens equal (x - mean) / sqrt(biased variance + eps), computed in float64 by hand, to 1e-6."""
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01 + 3
    by_hand = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert whiten(x, 1e-5).dtype == torch.float32
    # float32 keeps 3 +- 0.01 to 2e-7, which is 2e-5 of the spread
    assert torch.allclose(whiten(x, 1e-5).double(), by_hand, atol=5e-5)
    assert torch.allclose(whiten(x - 3, 1e-5).double(), by_hand, atol=1e-6)


def test_raw_outputs_are_what_is_whitened(tmp_path):
    """A teacher that gives raw block outputs gives those whose whitening it gave before, and fills no store."""
    teacher, images = load_teacher("demo", "random:0"), crops_u8(2, 32)
    before = teacher(images, [2, 6])
    raw = teacher.give_raw()(images, [2, 6])
    assert torch.equal(whiten(raw.tokens, teacher.spec.norm_eps), before.tokens) and torch.equal(raw.attention, before.attention)
    assert not torch.allclose(raw.tokens, before.tokens, atol=0.1)
    with pytest.raises(UsageError, match="stores keep whitened ones"):
        make_cache(tmp_path / "c", teacher=teacher)


def test_position_table_keeps_its_prefix_and_follows_the_recorded_rule():
    """A resized table has its first rows untouched and its patch rows interpolated bicubically without antialias."""
    table = torch.randn(1, 2 + 16, 3, generator=torch.Generator().manual_seed(0))
    resized = OURS.resize(table, 2, (3, 3))
    assert torch.equal(resized[:, :2], table[:, :2])
    as_image = table[:, 2:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(as_image, (3, 3), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(resized[:, 2:], expected.permute(0, 2, 3, 1).reshape(1, 9, 3))
    antialiased = F.interpolate(as_image, (3, 3), mode="bicubic", align_corners=False, antialias=True)
    assert not torch.allclose(expected, antialiased, atol=1e-3)
    assert all("bicubic" in rule and "no antialias" in rule for rule in (RESIZE, OURS.words))
    assert OURS.resize(table, 2, (4, 4)) is table
    assert OURS.resize(table[0], 2, (3, 3)).shape == (11, 3)
    with pytest.raises(BadInputError, match="15 patch rows"):
        OURS.resize(table[:, 1:], 2, (3, 3))


def test_output_has_the_shape_and_order_of_the_layers_asked_for(tiny):
    """Asking for blocks 2, 5, 6 gives what asking for each alone gives, stacked; the map does not depend on it."""
    images = crops_u8(3, 32)
    together = tiny(images, [2, 5, 6])
    assert together.tokens.shape == (3, 3, 65, 64) and together.tokens.dtype == torch.float32
    assert together.attention.shape == (3, 64) and together.attention.dtype == torch.float32
    for position, number in enumerate([2, 5, 6]):
        alone = tiny(images, [number])
        assert torch.equal(alone.tokens[:, 0], together.tokens[:, position])
        assert torch.equal(alone.attention, together.attention)
    assert (together.attention.sum(1) < 1).all() and (together.attention > 0).all()


def test_targets_can_stand_in_a_loss(tiny):
    """A student's backward pass through a loss on live targets works, and no gradient reaches the teacher."""
    target = tiny(crops_u8(2, 32), [6]).tokens
    assert not target.requires_grad
    scale = torch.ones((), requires_grad=True)
    (scale * target * target).mean().backward()
    assert scale.grad.item() == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_crops_of_another_size_are_resized_as_recorded(tiny):
    """A 40-pixel crop enters as its bicubic, not antialiased 32-pixel resize, normalised by mean and std."""
    images = crops_u8(2, 40)
    as_tensor = images.permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(as_tensor, (32, 32), mode="bicubic", align_corners=False, antialias=False)
    assert torch.allclose(tiny.preprocess(images), (resized - 0.5) / 0.5, atol=1e-6)
    assert torch.equal(tiny.preprocess(crops_u8(2, 32)), (crops_u8(2, 32).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "demo"])
def test_a_compiled_teacher_says_the_same(name):
    """With its blocks compiled, a teacher gives the tokens and the attention it gave before, for any choice of layers."""
    teacher = load_teacher(name, None if name == "demo" else "random:0", 32, "cpu", "fp32")
    side = teacher.spec.image_size
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = [teacher(images, layers) for layers in ((1, teacher.spec.depth), (2,))]
    torch._dynamo.reset()
    teacher.compile(backend="aot_eager")
    for layers, expected in zip(((1, teacher.spec.depth), (2,)), before, strict=True):
        again = teacher(images, layers)
        torch.testing.assert_close(again.tokens, expected.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again.attention, expected.attention, atol=1e-6, rtol=1e-4)


def test_attention_of_a_pooling_head_and_no_final_norm(tiny):
    """`pool` asks for what the last block gives, in float32; a teacher without final norm has no head, and whitened tokens."""
    seen = []

    def pool_attention(stream):
        seen.append(stream)
        return stream[:, 1:].mean(2).softmax(1)

    anatomy = replace(tiny._anatomy, final_norm=None, attention_parts=None, pool_attention=pool_attention)
    teacher = Teacher(replace(tiny.spec, attention_source="pool", head="none"), anatomy)
    images = crops_u8(2, 32)
    output = teacher(images, [teacher.spec.depth])
    assert teacher.head == {} and torch.equal(output.tokens, tiny(images, [6]).tokens)
    (stream,) = seen
    assert stream.dtype == torch.float32 and torch.equal(whiten(stream, teacher.spec.norm_eps), output.tokens[:, 0])
    assert torch.equal(output.attention, stream[:, 1:].mean(2).softmax(1))
    assert Teacher(replace(tiny.spec, attention_source=None), tiny._anatomy)(images, [6]).attention is None


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(2, 32, 32, 3), "torch.float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"\[2, 3, 32, 32\]"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"\[32, 32, 3\]"),
        (torch.zeros(2, 32, 48, 3, dtype=torch.uint8), "32 x 48"),
    ],
    ids=["float", "channels first", "no batch", "not square"],
)
def test_what_is_no_batch_of_crops_is_refused(tiny, images, says):
    """Anything but uint8 [B, side, side, 3] is an error that says what came."""
    with pytest.raises(UsageError, match=says):
        tiny(images, [6])


@pytest.mark.parametrize("layers", [[], [0], [7], [6, 5], [5, 5], [-1]], ids=str)
def test_layers_are_ascending_block_numbers(tiny, layers):
    """Layers outside 1..depth, doubled, or out of order are refused with the range."""
    with pytest.raises(UsageError, match="1 to 6, ascending"):
        tiny(crops_u8(1, 32), layers)


@pytest.mark.parametrize("name", ["demo", "clip-b16", "timm:test_vit"])
def test_bf16_on_a_cpu_without_it_is_refused_with_the_reason(name, monkeypatch):
    """Where the processor has no instruction for bf16 the error says which there are, and that it would be slower."""
    monkeypatch.setattr(device, "cpu_bf16", lambda: None)
    with pytest.raises(UsageError, match="no instruction for it .*avx512_bf16.*four times slower"):
        load_teacher(name, "random:0", precision="bf16")


@pytest.mark.parametrize("name", ["demo", "timm:test_vit"])
def test_bf16_on_a_cpu_that_has_it(name, monkeypatch):
    """Tokens and attention are float32's to 3 %, and not equal; `fp32` of one batch is float32's exactly."""
    monkeypatch.setattr(device, "cpu_bf16", lambda: "avx512_bf16")
    rounded, exact = (load_teacher(name, "random:0", precision=precision) for precision in ("bf16", "fp32"))
    crops, layers = crops_u8(2, exact.spec.image_size), (1, exact.spec.depth)
    found, expected = rounded(crops, layers), exact(crops, layers)
    for mine, theirs in ((found.tokens, expected.tokens), (found.attention, expected.attention)):
        assert mine.dtype == torch.float32 and 1e-5 < ((mine - theirs).norm() / theirs.norm()).item() < 3e-2
    assert torch.equal(rounded(crops, layers, "fp32").tokens, expected.tokens)


def test_float16_does_not_exist():
    """fp16 is refused with the reason, and the two precisions there are."""
    with pytest.raises(UsageError, match="fp32 or bf16, not 'fp16'.*overflow"):
        load_teacher("demo", "random:0", precision="fp16")


@pytest.mark.parametrize("size", [30, 2, -32])
def test_an_image_size_that_patches_do_not_fill_is_refused(size):
    """The error names the patch size and a size that would do."""
    with pytest.raises(UsageError, match=r"patches of 4 pixels.*--image-size (28 or 32|4 or 8)"):
        load_teacher("demo", "random:0", image_size=size)


def test_an_unknown_name_lists_the_known_ones():
    """A typing error is answered with the likely name and all others."""
    with pytest.raises(
        UnknownNameError, match="Did you mean clip-b16.*Known: clip-b16, .*demo; and besides timm:NAME and open_clip:"
    ):
        load_teacher("clip-b6")
    with pytest.raises(UnknownNameError, match="Known: clip-b16"):
        load_teacher("something else")


def test_listing_the_teachers_does_not_import_torch():
    """`teacher-cache teachers` is quick: the table stands without torch, timm or open_clip."""
    script = (
        "import sys; from teacher_cache.teachers import TEACHERS; assert len(TEACHERS) > 1;"
        "sys.exit(', '.join({'torch', 'timm', 'open_clip'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def without_numbers(monkeypatch):
    """Models are built, but neither initialised nor filled: what is told by shapes alone is then quick at full size."""
    for name in ("kaiming_uniform_", "uniform_", "trunc_normal_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr(torch, "randn", torch.empty)
    monkeypatch.setattr(load, "random_weights", lambda model, seed: None)
    monkeypatch.setattr(load, "sha256_tensors", lambda tensors: "0" * 64)


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_the_table_describes_what_is_loaded(name, without_numbers):
    """A teacher's spec agrees with its line in the table, and its head has the shapes that follow from it."""
    entry, teacher = TEACHERS[name], load_teacher(name, "random:1")
    for field in ("name", "dim", "depth", "heads", "patch_size", "image_size", "grid", "mean", "std", "norm_eps"):
        assert getattr(teacher.spec, field) == getattr(entry, field)
    assert teacher.spec.projection_dim == entry.projection_dim
    shapes = {"gamma": (entry.dim,), "beta": (entry.dim,)}
    if entry.projection_dim:
        shapes["projection"] = (entry.dim, entry.projection_dim)
    assert {key: array.shape for key, array in teacher.head.items()} == shapes
    assert all(array.dtype == np.float32 for array in teacher.head.values())
    assert set(entry.pickled) <= set(STAND_INS)
    assert teacher.spec.activation == ("quick_gelu" if entry.module == "clip" else "gelu")


def test_every_teacher_of_a_vit_16_or_of_clip_l14_has_14_by_14_tokens():
    """The presets' grid is the default one of every ViT in the table, clip-l14 at 196 pixels included; the Swins' is 7 x 7."""
    grids = {name: entry.grid for name, entry in TEACHERS.items() if name != "demo"}
    assert {name for name, grid in grids.items() if grid == (7, 7)} == {"moby-swin-t", "moby-swin-b"}
    assert {grid for name, grid in grids.items() if "swin" not in name} == {(14, 14)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["demo", "clip-b16", "moby-swin-t", "moco-v3-s16"])
def test_on_a_gpu_both_precisions_agree_with_the_cpu(name):
    """On CUDA, fp32 is the CPU's answer to 1e-3 (TF32 is off), bf16 to a relative error of 3 %."""
    cpu = load_teacher(name, "random:0")
    images, layers = crops_u8(4, cpu.spec.image_size), [cpu.spec.depth - 1, cpu.spec.depth]
    expected = cpu(images, layers)
    for precision, bound in (("fp32", 1e-3), ("bf16", 3e-2)):
        output = load_teacher(name, "random:0", device="cuda", precision=precision)(images.cuda(), layers)
        assert output.tokens.dtype == torch.float32 and (output.attention is None or output.attention.dtype == torch.float32)
        for found, wanted in ((output.tokens, expected.tokens), (output.attention, expected.attention)):
            assert wanted is None or (found.cpu() - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize(
    ("module", "name"),
    [(torch.nn.GELU(), "gelu"), (torch.nn.GELU("tanh"), "gelu_tanh"), (torch.nn.SiLU(), "silu"), (QuickGELU(), "quick_gelu"),
     (timm.layers.create_act_layer("gelu_tanh"), "gelu_tanh"), (timm.layers.create_act_layer("quick_gelu"), "quick_gelu")],
)  # fmt: skip
def test_activations_have_one_name_each(module, name):
    """An activation is called the same, whichever library it comes from."""
    assert activation_name(module) == name
