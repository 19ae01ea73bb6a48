"""The official files of DINO, MoCo v3, SLIP, MAE and MoBY load strictly, and give what timm or the papers' code computes."""

import dataclasses
from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from teacher_fakes import (
    crops_u8,
    dino_file,
    dino_full_file,
    fixed_table,
    mae_file,
    moby_file,
    moco_file,
    noise,
    prefixed,
    save,
    slip_file,
    timm_swin,
    timm_vit,
)
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.published_vit import COLUMNS_FIRST, LEARNED, ROWS_FIRST, fixed_positions, kind_of_positions
from teacher_cache.teachers.weights.files import read_file

FAMILIES = {
    "dino": dino_file,
    "dino, full": dino_full_file,
    "moco-v3": moco_file,
    "slip": partial(slip_file, projection=torch.randn(48, 20, generator=torch.Generator().manual_seed(1))),
    "mae": mae_file,
}


def tiny(family: str):
    """The entry of a family's ViT-B, at a size that loads in milliseconds."""
    name = family.split(",")[0]
    entry = TEACHERS[f"{name}-b16"]
    small = dataclasses.replace(entry, name=f"{name}-tiny", dim=48, depth=3, heads=4, patch_size=8, image_size=32)
    return dataclasses.replace(small, projection_dim=20) if small.projection_dim else small


def load(entry, path, **options):
    return import_module(f"teacher_cache.teachers.{entry.module}").load(entry, path, **options)


@torch.no_grad()
def check_against_timm(teacher, model, images: Tensor, layers: list[int]) -> None:
    """Taps, CLS map and final norm of a teacher against timm's own, on a model with the same weights."""
    output, normalised = teacher(images, layers), teacher.preprocess(images)
    model.blocks[-1].attn.fused_attn = False
    maps = []
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, inputs, softmax: maps.append(softmax))
    taps = model.forward_intermediates(
        normalised,
        indices=[layer - 1 for layer in layers],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    for position, (patches, cls) in enumerate(taps):
        assert torch.allclose(output.tokens[:, position], whiten(torch.cat([cls, patches], 1), 1e-6), atol=1e-4)
    features = model.forward_features(normalised)
    assert torch.allclose(output.attention, maps[-1].mean(1)[:, 0, 1:], atol=1e-6)
    assert output.attention.std(1).min() > 1e-4  # a flat map would fit nearly anything
    gamma, beta = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta"))
    assert torch.allclose(output.tokens[:, -1] * gamma + beta, features, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_official_layout_gives_timms_numbers(family, tmp_path):
    """Tokens, map and final norm from each official layout equal timm's on the same weights; all else is left out by name."""
    entry = tiny(family)
    model = timm_vit(entry)
    made = FAMILIES[family](model)
    path = save(made, tmp_path / "official.pth")
    teacher = load(entry, path)
    check_against_timm(teacher, model, crops_u8(3, 32), [1, 2, 3])
    assert (teacher.spec.weights, teacher.spec.name, teacher.spec.grid) == ("official.pth", entry.name, (4, 4))
    n_inner = len(made.get("teacher", made.get("state_dict", made.get("model", made))))
    assert len(teacher.ignored_weights) == n_inner - len(model.state_dict()) - bool(entry.projection_dim)
    assert (teacher.spec.mean, teacher.spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(("name", "heads"), [("dino-s16", 6), ("moco-v3-s16", 12)])
def test_the_small_vits_differ_in_their_heads_only(name, heads, tmp_path):
    """DINO's ViT-S computes with 6 heads and MoCo v3's with 12, at full width, from files with the same shapes."""
    assert TEACHERS[name].heads == heads
    entry = dataclasses.replace(TEACHERS[name], depth=2)
    model = timm_vit(entry)
    made = dino_file(model) if entry.module == "dino" else moco_file(model)
    teacher = load(entry, save(made, tmp_path / "official.pth"))
    images = crops_u8(1, 224)
    check_against_timm(teacher, model, images, [1, 2])

    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim = 18 - heads, 384 // (18 - heads)
        block.attn.scale = block.attn.head_dim**-0.5
    with torch.no_grad():
        other = model.forward_features(teacher.preprocess(images))
    gamma, beta = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta"))
    assert (teacher(images, [2]).tokens[:, 0] * gamma + beta - other).abs().mean() > 1e-2


def test_slip_has_its_image_projection(tmp_path):
    """The embedding of SLIP, final norm of CLS times its projection, follows from the head."""
    entry = tiny("slip")
    model, projection = timm_vit(entry), torch.randn(48, 20)
    teacher = load(entry, save(slip_file(model, projection), tmp_path / "slip.pt"))
    assert torch.equal(torch.from_numpy(teacher.head["projection"]), projection) and teacher.spec.projection_dim == 20
    images = crops_u8(2, 32)
    with torch.no_grad():
        expected = model(teacher.preprocess(images)) @ projection
    gamma, beta = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta"))
    assert torch.allclose((teacher(images, [3]).tokens[:, 0, 0] * gamma + beta) @ projection, expected, atol=1e-4)


def test_another_image_size_resizes_the_table_in_the_file(tmp_path):
    """At 48 pixels MoCo v3's table is the one in the file interpolated, not a new one for 6 x 6."""
    entry = tiny("moco-v3")
    path = save(moco_file(timm_vit(entry)), tmp_path / "moco.pth.tar")
    teacher = load(entry, path, image_size=48)
    assert teacher.spec.grid == (6, 6) and teacher(crops_u8(1, 32), [3]).tokens.shape == (1, 1, 37, 48)
    table = teacher._anatomy.model.pos_embed
    assert kind_of_positions(table) == LEARNED
    as_image = fixed_table(4, 48, rows_first=True)[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    expected = F.interpolate(as_image, (6, 6), mode="bicubic", align_corners=False, antialias=False)
    assert torch.allclose(table[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 36, 48), atol=1e-5)


def test_both_fixed_tables_are_the_papers():
    """MAE's table has the column first and MoCo v3's the row; each is told from the other and from a learned one."""
    for kind, rows_first in ((COLUMNS_FIRST, False), (ROWS_FIRST, True)):
        table = fixed_table(7, 64, rows_first)
        assert torch.allclose(fixed_positions(7, 64, kind), table, atol=1e-5)
        assert kind_of_positions(table.half().float()) == kind
    assert kind_of_positions(0.02 * torch.randn(1, 50, 64)) == LEARNED


@pytest.mark.parametrize(
    ("family", "of"),
    [("mae", "moco-v3"), ("moco-v3", "mae"), ("mae", "dino"), ("dino", "mae"), ("dino", "moco-v3"), ("slip", "mae")],
)
def test_another_familys_table_is_told_where_names_and_shapes_fit(family, of, tmp_path):
    """A file whose names and shapes fit, but whose position table is another family's, is refused; random weights are not."""
    entry, other = tiny(family), tiny(of)
    path = save(FAMILIES[family](timm_vit(dataclasses.replace(other, projection_dim=None))), tmp_path / "weights.pth")
    with pytest.raises(BadInputError, match=f"another teacher's file: its names and shapes fit {entry.name}.*Heads.*published"):
        load(entry, path)
    assert load(entry, "random:0").spec.weights == "random:0"


def test_a_wrapper_of_another_family_is_refused_by_its_names(tmp_path):
    """Each family's file, given to each other one, is refused in one sentence that lists names."""
    for family, make in FAMILIES.items():
        path = save(make(timm_vit(tiny(family))), tmp_path / "weights.pth")
        for other in set(FAMILIES) - {family, "dino, full"}:
            if {family, other} in ({"dino", "mae"}, {"dino", "dino, full"}):
                continue  # both without a prefix: their tables tell
            with pytest.raises(BadInputError) as caught:
                load(tiny(other), path)
            message = str(caught.value)
            assert "\n" not in message and "published" in message
            assert "unexpected" in message or "it pickles " in message  # by its names, or by what it holds beside tensors


def test_slips_own_clip_is_no_slip(tmp_path):
    """The file of the same repository's CLIP has the same tower, and lacks the self-supervised head: refused by that."""
    entry = tiny("slip")
    made = slip_file(timm_vit(entry), torch.zeros(48, 20))
    made["state_dict"] = {name: t for name, t in made["state_dict"].items() if "image_mlp" not in name}
    with pytest.raises(BadInputError, match=r"1 missing \(module.image_mlp.layer1.weight\)"):
        load(entry, save(made, tmp_path / "clip_base_25ep.pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_extra_names_are_listed_as_the_file_has_them(family, tmp_path):
    """One name less, or one that nobody knows, is an error with the name as it stands in the official file."""
    entry = tiny(family)
    made = FAMILIES[family](timm_vit(entry))
    inner = next((made[key] for key in ("teacher", "state_dict", "model") if key in made), made)
    gone = next(name for name in inner if name.endswith("blocks.1.attn.qkv.bias"))
    del inner[gone]
    prefix = gone.removesuffix("blocks.1.attn.qkv.bias")
    inner[f"{prefix}blocks.1.attn.qkv.scale"] = torch.zeros(3)
    with pytest.raises(BadInputError) as caught:
        load(entry, save(made, tmp_path / "official.pth"))
    assert f"1 missing ({gone})" in str(caught.value)
    assert f"1 unexpected ({prefix}blocks.1.attn.qkv.scale)" in str(caught.value)


def test_a_file_of_another_size_names_the_shapes(tmp_path):
    """A ViT-S's file given to the ViT-B is refused by shapes."""
    entry = tiny("dino")
    path = save(dino_file(timm_vit(dataclasses.replace(entry, dim=64))), tmp_path / "dino.pth")
    with pytest.raises(BadInputError, match=r"of another shape \(blocks.0.attn.proj.bias: \(64,\) instead of \(48,\)"):
        load(entry, path)


def test_a_finetuned_mae_and_one_with_a_decoder(tmp_path):
    """MAE's file for visualisation loads as the encoder alone; a fine-tuned one, with a classifier, is refused."""
    entry = tiny("mae")
    model = timm_vit(entry)
    full = {"model": mae_file(model)["model"] | noise("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")}
    teacher = load(entry, save(full, tmp_path / "mae_visualize_vit_base.pth"))
    assert teacher.ignored_weights == ("decoder_blocks.0.norm1.weight", "decoder_pos_embed", "mask_token")
    tuned = {"model": mae_file(model)["model"] | noise("head.weight", "fc_norm.weight")}
    with pytest.raises(BadInputError, match=r"2 unexpected \(fc_norm.weight, head.weight\)"):
        load(entry, save(tuned, tmp_path / "mae_finetuned_vit_base.pth"))


def test_a_state_dict_saved_as_safetensors_is_the_same_teacher(tmp_path):
    """The advice of the error messages works: the state dict of an official file, saved as safetensors, loads alike."""
    entry = tiny("moco-v3")
    made = moco_file(timm_vit(entry))
    save_file(made["state_dict"], tmp_path / "moco.safetensors")
    teachers = [load(entry, tmp_path / "moco.safetensors"), load(entry, save(made, tmp_path / "moco.pth.tar"))]
    images = crops_u8(2, 32)
    assert torch.equal(*(teacher(images, [3]).tokens for teacher in teachers))


@pytest.mark.parametrize("name", ["clip-l14", "dino-s16", "moco-v3-b16", "moby-swin-t", "slip-b16", "mae-b16"])
def test_without_weights_the_file_to_download_is_named(name):
    """Every teacher that ships without weights says which file it needs."""
    with pytest.raises(
        UsageError, match=f"Teacher {name} needs its weights, .*: .*(pt|pth|tar|safetensors).*--weights PATH.*random:0"
    ):
        load_teacher(name)


# --- MoBY's Swin


@pytest.fixture(scope="module")
def swin():
    return timm_swin()


@pytest.fixture(scope="module")
def moby_path(swin, tmp_path_factory):
    return save(moby_file(swin), tmp_path_factory.mktemp("moby") / "moby_swin_t_300ep_pretrained.pth")


@pytest.fixture(scope="module")
def moby(moby_path):
    return load_teacher("moby-swin-t", moby_path)


@torch.no_grad()
def test_moby_is_timms_swin(moby, swin):
    """Both blocks of the last stage, whitened row by row, and the last norm equal timm's; no CLS, no attention."""
    images = crops_u8(2, 224)
    output, normalised = moby(images, [1, 2]), moby.preprocess(images)
    assert output.tokens.shape == (2, 2, 49, 768) and output.attention is None
    spec = moby.spec
    assert (spec.grid, spec.dim, spec.depth, spec.heads, spec.patch_size) == ((7, 7), 768, 2, 24, 32)
    assert not spec.has_cls and spec.n_tokens == 49 and spec.norm_eps == 1e-5

    seen = []
    handles = [block.register_forward_hook(lambda m, i, output: seen.append(output)) for block in swin.layers[3].blocks]
    features = swin.forward_features(normalised)  # [B, 7, 7, 768], normed
    for handle in handles:
        handle.remove()
    for position, raw in enumerate(seen):
        assert torch.allclose(output.tokens[:, position], whiten(raw.reshape(2, 49, 768), 1e-5), atol=1e-4)
    gamma, beta = (torch.from_numpy(moby.head[name]) for name in ("gamma", "beta"))
    final = output.tokens[:, 1] * gamma + beta
    assert torch.allclose(final, features.reshape(2, 49, 768), atol=1e-4)
    assert final.std(1).mean() > 0.1  # places differ


@torch.no_grad()
def test_moby_is_the_papers_swin_by_hand(moby, moby_path):
    """The same tokens come out of the official names and plain torch: windows, shifts, biases and merging spelt out."""
    images, made = crops_u8(1, 224), read_file(moby_path, TEACHERS["moby-swin-t"].pickled)["model"]
    encoder = {name.removeprefix("encoder."): t for name, t in made.items() if name.startswith("encoder.")}
    expected = swin_by_hand(encoder, moby.preprocess(images))
    gamma, beta = (torch.from_numpy(moby.head[name]) for name in ("gamma", "beta"))
    assert torch.allclose(moby(images, [2]).tokens[:, 0] * gamma + beta, expected, atol=1e-3)


def swin_by_hand(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Swin-T's last norm [B, 49, 768] from the official names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        side = x.shape[1]
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            shift = 3 if number % 2 and side > 7 else 0
            x = x + window_attention(norm(x, f"{block}.norm1"), state, f"{block}.attn", heads, shift)
            x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if stage < 3:
            corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = linear(norm(torch.cat(corners, -1), f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction")
    return norm(x, "norm").flatten(1, 2)


def window_attention(x: Tensor, state: dict[str, Tensor], name: str, heads: int, shift: int) -> Tensor:
    """Attention within 7 x 7 windows, moved by `shift` around the edges, where tokens from both sides do not see each other."""
    batch, side, _, dim = x.shape
    place = torch.arange(side).add(shift).remainder(side)  # of each shifted row or column
    x = x[:, place][:, :, place]
    region = (torch.arange(side) >= side - 7).long() + (torch.arange(side) >= side - shift).long() if shift else torch.zeros(side)
    regions = 3 * region[:, None] + region[None]  # [side, side]

    def windows(y):  # [B, side, side, .] -> [B, windows, 49, .]
        return y.unflatten(1, (-1, 7)).unflatten(3, (-1, 7)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    labels = windows(regions[None, :, :, None])[0, :, :, 0]  # [windows, 49]
    qkv = F.linear(windows(x), state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"])
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, windows, heads, 49, dim / heads]
    rows, columns = torch.arange(49) // 7, torch.arange(49) % 7
    offset = (rows[:, None] - rows[None] + 6) * 13 + columns[:, None] - columns[None] + 6  # [49, 49]
    bias = state[f"{name}.relative_position_bias_table"][offset].permute(2, 0, 1)  # [heads, 49, 49]
    apart = labels[:, None, :, None] != labels[:, None, None, :]  # [windows, 1, 49, 49]
    logits = query @ key.transpose(-2, -1) * (dim // heads) ** -0.5 + bias
    out = logits.masked_fill(apart, -100.0 * 10).softmax(-1) @ value  # [B, windows, heads, 49, dim / heads]
    out = F.linear(out.transpose(2, 3).flatten(3), state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])
    out = out.unflatten(1, (side // 7, side // 7)).unflatten(3, (7, 7)).transpose(2, 3).reshape(batch, side, side, dim)
    back = place.argsort()
    return out[:, back][:, :, back]


def test_mobys_other_parts_are_left_out_by_name(moby, swin):
    """Momentum encoder, heads, queues and the two buffers are left out; everything else is the tower's."""
    ignored = set(moby.ignored_weights)
    assert {"queue1", "queue_ptr", "predictor.linear_out.weight", "encoder_k.norm.weight"} <= ignored
    assert {"encoder.layers.0.blocks.1.attn_mask", "encoder.layers.0.blocks.0.attn.relative_position_index"} <= ignored
    assert not any(name.startswith("encoder.norm") for name in ignored)


def hollow(made: dict) -> dict:
    """A Swin's file with the right names and shapes and one number behind each, which takes no space."""
    return made | {"model": {name: torch.zeros(()).expand(tensor.shape) for name, tensor in made["model"].items()}}


def test_a_swin_with_other_heads_or_names_is_refused(tmp_path, swin):
    """A Swin's bias tables tell its heads: 4, 8, 16, 32 at the same width are refused by shape; timm's own names by name."""
    with torch.device("meta"):
        other = SwinTransformer(num_heads=(4, 8, 16, 32), num_classes=0)
    with pytest.raises(
        BadInputError, match=r"12 of another shape .*relative_position_bias_table: \(169, 4\) instead of \(169, 3\)"
    ):
        load_teacher("moby-swin-t", save(hollow(moby_file(other)), tmp_path / "heads.pth"))
    renamed = hollow(moby_file(swin))
    renamed["model"]["encoder.layers.3.downsample.norm.weight"] = torch.zeros(1536)
    with pytest.raises(BadInputError, match=r"1 unexpected \(encoder.layers.3.downsample.norm.weight\)"):
        load_teacher("moby-swin-t", save(renamed, tmp_path / "downsample.pth"))


def test_the_deit_that_the_readme_links_instead_is_refused(tmp_path):
    """moby_deit_small, which the README's link for Swin-T gives, has a ViT under `encoder.`: refused, names listed."""
    deit = {"model": prefixed("encoder.", timm_vit(tiny("dino")).state_dict())}
    with pytest.raises(BadInputError, match=r"missing \(encoder.layers.*unexpected \(encoder.blocks.0"):
        load_teacher("moby-swin-t", save(deit, tmp_path / "moby_deit_small_300ep_pretrained.pth"))


def test_a_swin_has_one_input_size_and_two_layers(moby):
    """Another --image-size, and layers of earlier stages, are refused with the reason."""
    with pytest.raises(UsageError, match="224 x 224 pixels only.*windows are 7 x 7.*leave out --image-size 256"):
        load_teacher("moby-swin-t", "random:0", image_size=256)
    assert load_teacher("moby-swin-t", "random:0", image_size=224).spec.image_size == 224
    with pytest.raises(UsageError, match="block numbers 1 to 2"):
        moby(crops_u8(1, 224), [11, 12])


@torch.no_grad()
def test_the_residual_stream_of_a_swin_stays_float32_under_autocast(moby):
    """Merging patches is a matrix product, which autocast makes bf16; what enters the next stage is float32 again."""
    model, entering = moby._anatomy.model, []
    handles = [
        stage.blocks[0].register_forward_pre_hook(lambda block, inputs: entering.append(inputs[0].dtype))
        for stage in model.layers[1:]
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.layers[1].downsample.reduction(torch.zeros(1, 384)).dtype == torch.bfloat16
        model(moby.preprocess(crops_u8(1, 224)))
    for handle in handles:
        handle.remove()
    assert entering == [torch.float32] * 3
