"""The encoders: timm's ViT and Swin with masks, and the masked-convolution ViT."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from student import MCMAEConfig, SwinConfig, ViT, ViTConfig
from student.batch import Mask
from student.modules.backbones import build_backbone
from student.modules.backbones.mcmae import MaskedConvBlock
from student.modules.positions import sincos_positions

CONFIG = ViTConfig(image_size=16, patch_size=4, dim=16, depth=3, heads=2, drop_path=0.2)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def timm_vit(backbone: ViT) -> VisionTransformer:
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    vit.load_state_dict(backbone.state_dict(), strict=True)
    return vit.eval()


def test_all_tokens_kept_is_timm():
    """With every patch visible the masked pass gives what timm's forward_features gives on the same weights."""
    backbone = ViT(CONFIG).eval()
    everything = torch.arange(16).expand(2, 16)
    encoded = backbone(IMAGES, Mask(everything, everything[:, :0]))
    expected = timm_vit(backbone).forward_features(IMAGES)
    assert torch.equal(encoded.tokens, expected)
    assert torch.equal(backbone.encode_all(IMAGES), expected)


def test_hidden_patches_are_not_seen():
    """Changing the pixels of hidden patches changes nothing; changing a visible one does."""
    backbone = ViT(CONFIG).eval()
    mask = Mask(torch.tensor([[0, 5]] * 2), torch.tensor([[n for n in range(16) if n not in (0, 5)]] * 2))
    before = backbone(IMAGES, mask).tokens
    other = IMAGES.clone()
    other[:, :, 4:8, 8:12] += 1  # patch 6
    assert torch.equal(backbone(other, mask).tokens, before)
    other[:, :, 4:8, 4:8] += 1  # patch 5
    assert not torch.equal(backbone(other, mask).tokens, before)


def test_visible_tokens_carry_their_own_position():
    """The order in which patches are kept only orders the output."""
    backbone = ViT(CONFIG).eval()
    drop = torch.tensor([[n for n in range(16) if n not in (2, 7, 9)]] * 2)
    one = backbone(IMAGES, Mask(torch.tensor([[2, 7, 9]] * 2), drop)).tokens
    two = backbone(IMAGES, Mask(torch.tensor([[9, 2, 7]] * 2), drop)).tokens
    torch.testing.assert_close(two[:, [0, 2, 3, 1]], one)


def test_layers_and_fusion():
    """`layers` are the block outputs, and `tokens` the final norm of the sum of the fused ones."""
    fused = ViTConfig(image_size=16, patch_size=4, dim=16, depth=3, heads=2, fuse_blocks=(1, 3))
    backbone = ViT(fused).eval()
    everything = torch.arange(16).expand(2, 16)
    encoded = backbone(IMAGES, Mask(everything, everything[:, :0]))

    taps = timm_vit(backbone).forward_intermediates(
        IMAGES, indices=3, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for layer, (patches, cls) in zip(encoded.layers, taps, strict=True):
        assert torch.equal(layer, torch.cat([cls, patches], dim=1))
    assert torch.equal(encoded.tokens, backbone.norm(encoded.layers[0] + encoded.layers[2]))


@pytest.mark.parametrize(
    "name, dim, heads, n_parameters",
    [("vit_small_patch16_224", 384, 6, 21_665_664), ("vit_base_patch16_224", 768, 12, 85_798_656)],
)
def test_loads_strictly_into_timm(name, dim, heads, n_parameters):
    """The state dict has the names, shapes and parameter count of timm's model of that size."""
    with torch.device("meta"):
        backbone = ViT(ViTConfig(dim=dim, heads=heads))
        model = timm.create_model(name, num_classes=0)
    model.load_state_dict(backbone.state_dict(), strict=True, assign=True)
    assert sum(p.numel() for p in backbone.parameters()) == n_parameters


def test_initial_weights_are_those_of_mae():
    """Xavier-uniform Linears and patch embedding, zero biases, and CLS from N(0, 0.02)."""
    torch.manual_seed(0)
    backbone = ViT(ViTConfig(image_size=32, dim=192, depth=1, heads=3))
    qkv, conv = backbone.blocks[0].attn.qkv, backbone.patch_embed.proj.weight
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 3 * 192)) ** 0.5, rel=1e-3)
    assert conv.abs().max().item() == pytest.approx((6 / (192 + 3 * 16 * 16)) ** 0.5, rel=1e-3)
    assert not qkv.bias.any() and backbone.norm.eps == 1e-6
    assert backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not backbone.pos_embed.requires_grad


def test_position_table_convention():
    """Channels are [sin(column), cos(column), sin(row), cos(row)]; CLS has none; as written out with numpy."""
    table = sincos_positions(16, (2, 3)).numpy()
    assert table.shape == (7, 16) and not table[0].any()
    omega = 10000.0 ** (-np.arange(4) / 4)
    for row in range(2):
        for column in range(3):
            expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
            np.testing.assert_allclose(table[1 + row * 3 + column], np.concatenate(expected), atol=1e-6)


def test_moco_positions_are_the_halves_swapped():
    """MoCo v3's table is MAE's with the two halves of the channel axis swapped, and no other permutation of it."""
    mae, moco = sincos_positions(16, (3, 5)), sincos_positions(16, (3, 5), "moco")
    assert torch.equal(moco, mae.roll(8, dims=1)) and not torch.equal(moco, mae)
    assert torch.equal(ViT(ViTConfig(image_size=16, patch_size=4, dim=16, depth=1, heads=1, positions="moco")).pos_embed[0],
                       sincos_positions(16, (4, 4), "moco"))  # fmt: skip


SMALL = {
    "vit": CONFIG,
    "vit-mask-token": ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, hidden="mask-token", layer_scale=0.1),
    "mcmae": MCMAEConfig(image_size=16, strides=(1, 2, 2), dims=(8, 12, 16), depths=(1, 2, 2), heads=2),
    "swin": SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=(1, 2), heads=(2, 2), window=2),
}
MASK = Mask(torch.tensor([[3, 0, 9, 5]] * 2), torch.tensor([[n for n in range(16) if n not in (3, 0, 9, 5)]] * 2))


def changed(patch: int) -> torch.Tensor:
    """IMAGES with other pixels in one patch of 4 x 4."""
    images = IMAGES.clone()
    row, column = divmod(patch, 4)
    images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return images


@pytest.mark.parametrize("name", SMALL)
def test_nothing_hidden_is_seen(name):
    """Pixels of a hidden patch reach no output of any backbone, fused stages included; those of a visible one do."""
    torch.manual_seed(0)
    backbone = build_backbone(SMALL[name]).eval()
    before = backbone(IMAGES, MASK)
    for patch in (6, 1, 15):  # beside visible ones
        after = backbone(changed(patch), MASK)
        assert torch.equal(after.tokens, before.tokens) and all(map(torch.equal, after.layers, before.layers))
    assert not torch.equal(backbone(changed(5), MASK).tokens, before.tokens)


@pytest.mark.parametrize("name", SMALL)
def test_encode_all_and_shapes(name):
    """Shapes and CLS are what config and `Encoded` say; `encode_all` gives every patch."""
    config = SMALL[name]
    backbone = build_backbone(config).eval()
    encoded, tokens = backbone(IMAGES, MASK), backbone.encode_all(IMAGES)
    n = 4 if name in ("vit", "mcmae") else 16
    assert encoded.patches.shape == (2, n, 16) and encoded.has_cls == config.has_cls
    assert encoded.tokens.shape == (2, config.has_cls + n, 16) and tokens.shape == (2, config.has_cls + 16, 16)


def test_mask_tokens_stand_in_place():
    """With mask tokens, a ViT's hidden patches are the mask token plus their position, in the order of the image."""
    backbone = build_backbone(SMALL["vit-mask-token"]).eval()
    seen = {}
    backbone.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.update(x=inputs[0]))
    backbone(IMAGES, MASK)
    embedded, positions = backbone.patch_embed(IMAGES), backbone.pos_embed[:, 1:]
    for patch in range(16):
        expected = embedded[:, patch] if patch in (3, 0, 9, 5) else backbone.mask_token[:, 0].expand(2, -1)
        torch.testing.assert_close(seen["x"][:, 1 + patch], expected + positions[:, patch])


def test_swin_with_all_visible_is_timm():
    """On the same weights and with nothing hidden, Swin gives timm's features; its other names are timm's."""
    config = SMALL["swin"]
    backbone = build_backbone(config).eval()
    model = SwinTransformer(img_size=16, patch_size=2, num_classes=0, embed_dim=8, depths=(1, 2), num_heads=(2, 2), window_size=2)
    weights = backbone.state_dict()
    weights.pop("mask_token")
    model.load_state_dict(weights, strict=True)
    everything = torch.arange(16).expand(2, 16)
    expected = model.eval().forward_features(IMAGES).flatten(1, 2)
    torch.testing.assert_close(backbone(IMAGES, Mask(everything, everything[:, :0])).tokens, expected)
    torch.testing.assert_close(backbone.encode_all(IMAGES), expected)


@pytest.mark.parametrize("config, name", [
    (SwinConfig(), "swin_tiny_patch4_window7_224"),
    (SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)), "swin_base_patch4_window7_224"),
])  # fmt: skip
def test_swin_has_the_size_of_timms(config, name):
    """Swin-T and Swin-B have timm's parameters and one mask token."""
    backbone = build_backbone(config)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    n_parameters = sum(p.numel() for p in backbone.parameters())
    assert n_parameters == sum(p.numel() for p in model.parameters()) + config.embed_dim
    assert {name for name, _ in backbone.named_parameters()} == {"mask_token", *(name for name, _ in model.named_parameters())}


def test_masked_convolution_by_hand():
    """A block is x + conv2(5x5 depthwise(visible * conv1(norm(x)))), then x + mlp(norm(x)), written out with plain functions."""
    torch.manual_seed(1)
    block, x = MaskedConvBlock(6, 4.0, 0.0), torch.randn(2, 6, 4, 4)
    visible = (torch.rand(2, 1, 4, 4) > 0.5).float()

    def norm(x, module):
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return normed * module.weight[:, None, None] + module.bias[:, None, None]

    def pointwise(x, conv):
        return torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]

    padded = F.pad(visible * pointwise(norm(x, block.norm1), block.conv1), (2, 2, 2, 2))
    mixed = sum(
        block.depthwise.weight[:, 0, i, j][:, None, None] * padded[:, :, i : i + 4, j : j + 4] for i in range(5) for j in range(5)
    )
    expected = x + pointwise(mixed + block.depthwise.bias[:, None, None], block.conv2)
    hidden = pointwise(norm(expected, block.norm2), block.mlp.fc1)
    expected = expected + pointwise(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), block.mlp.fc2)
    torch.testing.assert_close(block(x, visible), expected)


def test_fused_stages_are_added_to_patches_only():
    """Strided convolutions of both stages are added to the last block's visible patches, before the norm; CLS stays."""
    torch.manual_seed(2)
    backbone = build_backbone(SMALL["mcmae"]).eval()
    outputs = {}
    for i, convolution in enumerate(backbone.fuse):
        convolution.register_forward_hook(lambda module, inputs, output, i=i: outputs.update({i: output}))
    encoded = backbone(IMAGES, MASK)
    fused = encoded.layers[-1].clone()
    for output in outputs.values():
        assert output.shape == (2, 16, 4, 4)
        fused[:, 1:] += output.flatten(2)[:, :, MASK.keep[0]].transpose(1, 2)
    torch.testing.assert_close(encoded.tokens, backbone.norm(fused))


def test_mcmae_has_the_size_its_table_gives():
    """The parameters of MCMAE-B, counted from the widths and depths of its table."""

    def conv_block(d):
        return 4 * d + 2 * (d * d + d) + (25 * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)

    def vit_block(d):
        return 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)

    a, b, c = 256, 384, 768
    embeds = (3 * 16 * a + a + 2 * a) + (4 * a * b + b + 2 * b) + (4 * b * c + c + 2 * c) + (c * c + c)
    fuse = (16 * a * c + c) + (4 * b * c + c)
    expected = embeds + 2 * conv_block(a) + 2 * conv_block(b) + 11 * vit_block(c) + fuse + c + 197 * c + 2 * c
    assert sum(p.numel() for p in build_backbone(MCMAEConfig()).parameters()) == expected


def test_initial_weights_of_cae():
    """CAE's patch embedding and CLS token come from a normal cut off at one deviation; Linears stay Xavier-uniform."""
    torch.manual_seed(0)
    backbone = ViT(ViTConfig(image_size=32, dim=192, depth=2, heads=12, init="cae", layer_scale=0.1))
    assert 0.0199 < backbone.patch_embed.proj.weight.abs().max() <= 0.02 and backbone.cls_token.abs().max() <= 0.02
    assert not backbone.patch_embed.proj.bias.any()
    assert backbone.blocks[1].ls2.gamma.tolist() == pytest.approx([0.1] * 192)
    qkv = backbone.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx((6 / (192 + 3 * 192)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("bias", [1.0, -3.0])
def test_a_bias_on_keys_changes_nothing(bias):
    """Softmax does not see what is added to all keys, so CAE's blocks without that bias are these blocks."""
    backbone = ViT(CONFIG).eval()
    before = backbone(IMAGES, MASK).tokens
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.bias[16:32] += bias
    torch.testing.assert_close(backbone(IMAGES, MASK).tokens, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_compiles_whole(name):
    """The forward pass is one graph for torch.compile."""
    torch._dynamo.reset()
    backbone = build_backbone(SMALL[name])
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = backbone.eval()(IMAGES, MASK).tokens
    torch.testing.assert_close(compiled(IMAGES, MASK).tokens, expected)


@pytest.mark.parametrize("name", SMALL)
def test_builds_without_memory(name):
    """A backbone can be built on the meta device, as a checkpoint's is before its weights are put in."""
    with torch.device("meta"):
        backbone = build_backbone(SMALL[name])
    assert all(parameter.is_meta for parameter in backbone.parameters())
