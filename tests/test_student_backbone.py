"""The encoder is timm's ViT with fewer tokens."""

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from student import Backbone, BackboneConfig
from student.masking import Mask
from student.positions import sincos_positions

CONFIG = BackboneConfig(image_size=16, patch_size=4, dim=16, depth=3, heads=2, drop_path=0.2)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def timm_vit(backbone: Backbone) -> VisionTransformer:
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    vit.load_state_dict(backbone.state_dict(), strict=True)
    return vit.eval()


def test_all_tokens_kept_is_timm():
    """With every patch visible the masked pass gives what timm's forward_features gives on the same weights."""
    backbone = Backbone(CONFIG).eval()
    everything = torch.arange(16).expand(2, 16)
    encoded = backbone(IMAGES, Mask(everything, everything[:, :0]))
    expected = timm_vit(backbone).forward_features(IMAGES)
    assert torch.equal(encoded.tokens, expected)
    assert torch.equal(backbone.encode_all(IMAGES), expected)


def test_hidden_patches_are_not_seen():
    """Changing the pixels of hidden patches changes nothing; changing a visible one does."""
    backbone = Backbone(CONFIG).eval()
    mask = Mask(torch.tensor([[0, 5]] * 2), torch.tensor([[n for n in range(16) if n not in (0, 5)]] * 2))
    before = backbone(IMAGES, mask).tokens
    other = IMAGES.clone()
    other[:, :, 4:8, 8:12] += 1  # patch 6
    assert torch.equal(backbone(other, mask).tokens, before)
    other[:, :, 4:8, 4:8] += 1  # patch 5
    assert not torch.equal(backbone(other, mask).tokens, before)


def test_visible_tokens_carry_their_own_position():
    """The order in which patches are kept only orders the output."""
    backbone = Backbone(CONFIG).eval()
    drop = torch.tensor([[n for n in range(16) if n not in (2, 7, 9)]] * 2)
    one = backbone(IMAGES, Mask(torch.tensor([[2, 7, 9]] * 2), drop)).tokens
    two = backbone(IMAGES, Mask(torch.tensor([[9, 2, 7]] * 2), drop)).tokens
    torch.testing.assert_close(two[:, [0, 2, 3, 1]], one)


def test_layers_and_fusion():
    """`layers` are the block outputs, and `tokens` the final norm of the sum of the fused ones."""
    fused = BackboneConfig(image_size=16, patch_size=4, dim=16, depth=3, heads=2, fuse_blocks=(1, 3))
    backbone = Backbone(fused).eval()
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
        backbone = Backbone(BackboneConfig(dim=dim, heads=heads))
        model = timm.create_model(name, num_classes=0)
    model.load_state_dict(backbone.state_dict(), strict=True, assign=True)
    assert sum(p.numel() for p in backbone.parameters()) == n_parameters


def test_initial_weights_are_those_of_mae():
    """Xavier-uniform Linears and patch embedding, zero biases, and CLS from N(0, 0.02)."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(image_size=32, dim=192, depth=1, heads=3))
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
