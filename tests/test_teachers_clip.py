"""CLIP's tower equals open_clip's own, from every layout its weights are published in."""

import dataclasses
import warnings

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from teacher_fakes import crops_u8
from torch import nn

from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.base import whiten
from teacher_cache.teachers.blocks.positions import OURS
from teacher_cache.teachers.clip import build_tower, load
from teacher_cache.teachers.weights.load import random_weights

TINY = dataclasses.replace(
    TEACHERS["clip-b16"],
    name="clip-tiny",
    dim=48,
    depth=3,
    heads=4,
    patch_size=8,
    image_size=32,
    projection_dim=20,
)


def open_clips_tower(name: str, **vision_changes) -> nn.Module:
    """The image tower as open_clip's factory builds it for one of its own configurations."""
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**config["vision_cfg"] | vision_changes)
    return _build_vision_tower(config["embed_dim"], vision, quick_gelu=config["quick_gelu"]).eval()


def published(tower: nn.Module) -> dict[str, torch.Tensor]:
    """The tower's tensors as `visual.*`, beside those of a text tower."""
    text = {
        "positional_embedding": torch.randn(7, 6),
        "text_projection": torch.randn(6, 20),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.randn(11, 6),
        "ln_final.weight": torch.ones(6),
        "ln_final.bias": torch.ones(6),
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(18, 6),
        "transformer.resblocks.0.ln_1.weight": torch.ones(6),
    }
    return {**text, **{f"visual.{name}": tensor.detach() for name, tensor in tower.state_dict().items()}}


def openai_archive(tower: nn.Module, path) -> None:
    """Write a TorchScript archive as OpenAI did: half precision, text tower beside `visual`, three integers."""

    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = tower
            self.transformer = nn.Linear(3, 3)
            self.token_embedding = nn.Embedding(5, 3)
            self.ln_final = nn.LayerNorm(3)
            self.positional_embedding = nn.Parameter(torch.zeros(2, 3))
            self.text_projection = nn.Parameter(torch.zeros(3, 3))
            self.logit_scale = nn.Parameter(torch.zeros(()))
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(32))

        def forward(self, images):
            return self.visual(images)

    with warnings.catch_warnings():  # that tracing is deprecated, and what it says about shapes
        warnings.simplefilter("ignore")
        archive = torch.jit.trace(Archive().eval(), torch.zeros(1, 3, 32, 32), check_trace=False)
        torch.jit.save(archive.half(), path)


@pytest.fixture
def tower():
    tower = build_tower(TINY).eval()
    random_weights(tower, 0)
    return tower


@torch.no_grad()
def check_against_open_clip(teacher, reference: nn.Module, images: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Taps, CLS map, ln_post and projection against open_clip's forward_intermediates and MultiheadAttention; the tokens."""
    output = teacher(images, layers)
    normalised = teacher.preprocess(images)

    maps = []
    attention = reference.transformer.resblocks[-1].attn

    def show_weights(module, arguments, keywords):
        return arguments, {**keywords, "need_weights": True, "average_attn_weights": True}

    handles = [
        attention.register_forward_pre_hook(show_weights, with_kwargs=True),
        attention.register_forward_hook(lambda module, inputs, outputs: maps.append(outputs[1])),
    ]
    found = reference.forward_intermediates(
        normalised, indices=[number - 1 for number in layers], output_fmt="NLC", output_extra_tokens=True
    )
    for handle in handles:
        handle.remove()

    for position, (cls, patches) in enumerate(
        zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
    ):
        raw = torch.cat([cls, patches], 1)
        assert torch.allclose(output.tokens[:, position], whiten(raw, 1e-5), atol=3e-5)
    assert torch.allclose(output.attention, maps[0][:, 0, 1:], atol=1e-6)
    assert output.attention.std(1).min() > 1e-4  # a flat map would fit nearly anything

    gamma, beta, projection = (torch.from_numpy(teacher.head[name]) for name in ("gamma", "beta", "projection"))
    final = output.tokens[:, -1] * gamma + beta
    assert torch.allclose(final, reference.ln_post(raw), atol=5e-5)
    assert torch.allclose(final[:, 0] @ projection, found["image_features"], atol=2e-4)
    return output.tokens


def test_a_small_tower_equals_open_clips(tower):
    """On random weights, taps, map, final norm and projection equal open_clip's (3e-5, 1e-6, 5e-5, 2e-4)."""
    teacher = load(TINY, "random:0")
    check_against_open_clip(teacher, tower, crops_u8(3, 32), [1, 2, 3])


@pytest.mark.parametrize(("name", "arch"), [("clip-b16", "ViT-B-16-quickgelu"), ("clip-l14", "ViT-L-14-quickgelu")])
def test_clip_is_open_clips_quickgelu_tower(name, arch):
    """At full width, two blocks deep, it equals the tower open_clip builds for `-quickgelu`, and not one with the exact GELU."""
    teacher = load(dataclasses.replace(TEACHERS[name], depth=2), "random:0", image_size=224)
    assert TEACHERS[name].depth == open_clip.get_model_config(arch)["vision_cfg"]["layers"]
    reference = open_clips_tower(arch, layers=2)
    random_weights(reference, 0)
    images = crops_u8(1, 224)
    tokens = check_against_open_clip(teacher, reference, images, [1, 2])

    activations = {type(block.mlp.gelu) for block in reference.transformer.resblocks}
    assert activations == {QuickGELU}
    for block in reference.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    with torch.no_grad():
        exact = reference.forward_intermediates(teacher.preprocess(images), indices=1, output_fmt="NLC")
    difference = whiten(exact["image_intermediates"][0], 1e-5) - tokens[:, 1, 1:]
    assert difference.abs().mean() > 1e-3


def test_l14_is_filled_at_its_native_size_and_used_at_another(tmp_path):
    """A file with clip-l14's native table loads into a teacher whose default input is smaller: the table is resized after it."""
    entry = dataclasses.replace(TINY, image_size=24, native_size=32)
    native = build_tower(entry).eval()
    random_weights(native, 0)
    torch.save(published(native), tmp_path / "ViT-L-14.pt")
    assert native.positional_embedding.shape == (17, 48)
    teacher = load(entry, tmp_path / "ViT-L-14.pt")
    assert (teacher.spec.image_size, teacher.spec.grid) == (24, (3, 3)) == (entry.image_size, entry.grid)

    reference = build_tower(dataclasses.replace(entry, native_size=None)).eval()
    table = OURS.resize(native.positional_embedding, 1, (3, 3))
    reference.load_state_dict({**native.state_dict(), "positional_embedding": table})
    check_against_open_clip(teacher, reference, crops_u8(2, 32), [1, 3])
    assert load(entry, tmp_path / "ViT-L-14.pt", image_size=32).spec.grid == (4, 4)


def test_every_layout_gives_the_same_teacher(tower, tmp_path):
    """OpenAI's TorchScript archive, a torch state dict and safetensors load to the same float32 weights."""
    images = crops_u8(2, 32)
    half = {name: tensor.half() for name, tensor in published(tower).items()}
    save_file(half, tmp_path / "open_clip_model.safetensors")
    torch.save(half, tmp_path / "open_clip_pytorch_model.bin")
    openai_archive(tower, tmp_path / "ViT-B-16.pt")

    rounded = build_tower(TINY).eval()
    rounded.load_state_dict({name: tensor.half().float() for name, tensor in tower.state_dict().items()})
    outputs, hashes = [], set()
    for path in tmp_path.iterdir():
        teacher = load(TINY, path)
        assert all(parameter.dtype == torch.float32 for parameter in teacher._anatomy.model.parameters())
        assert teacher.spec.weights == path.name
        assert "logit_scale" in teacher.ignored_weights and "ln_final.weight" in teacher.ignored_weights
        assert not any(name.startswith("visual.") for name in teacher.ignored_weights)
        outputs.append(check_against_open_clip(teacher, rounded, images, [2, 3]))
        hashes.add(teacher.spec.weights_sha256)
    assert len(outputs) == len(hashes) == 3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_missing_and_unexpected_names_are_listed(tower, tmp_path):
    """A file that lacks names of the tower, or has ones that nobody knows, is refused with names and counts."""
    state = published(tower)
    del state["visual.ln_post.bias"], state["visual.proj"]
    state |= {f"visual.extra.{i}": torch.zeros(1) for i in range(6)} | {"queue": torch.zeros(3)}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(BadInputError) as caught:
        load(TINY, tmp_path / "clip.pt")
    assert "2 missing (visual.ln_post.bias, visual.proj)" in str(caught.value)
    assert "7 unexpected (queue, visual.extra.0, visual.extra.1, visual.extra.2, ...)" in str(caught.value)


def test_names_without_their_prefix_are_not_taken_for_the_towers(tower, tmp_path):
    """A bare `ln_post.bias` beside `visual.ln_post.bias` is unexpected, it does not replace it."""
    torch.save({**published(tower), "ln_post.bias": torch.zeros(48)}, tmp_path / "clip.pt")
    with pytest.raises(BadInputError, match=r"1 unexpected \(ln_post.bias\)"):
        load(TINY, tmp_path / "clip.pt")


def test_a_file_of_another_clip_names_the_shapes(tower, tmp_path):
    """The weights of a wider tower do not load, and the message shows a shape that differs."""
    wider = build_tower(dataclasses.replace(TINY, projection_dim=24))
    torch.save(published(wider), tmp_path / "clip.pt")
    with pytest.raises(BadInputError, match=r"1 of another shape \(visual.proj: \(48, 24\) instead of \(48, 20\)\)"):
        load(TINY, tmp_path / "clip.pt")


def test_without_weights_the_file_to_download_is_named():
    """clip-b16 without --weights says which file, its published hash, and how to try without it."""
    with pytest.raises(UsageError, match=r"ViT-B-16\.pt \(sha256 5806e77c.*--weights PATH.*--weights random:0"):
        load_teacher("clip-b16")


@torch.no_grad()
def test_another_image_size_resizes_the_position_table():
    """At 48 pixels the tower equals open_clip's 48-pixel tower with our resized table, and 32-pixel crops go in."""
    teacher = load(TINY, "random:0", image_size=48)
    assert (teacher.spec.image_size, teacher.spec.grid) == (48, (6, 6))
    assert teacher.spec.weights_sha256 == load(TINY, "random:0").spec.weights_sha256

    native = build_tower(TINY)
    random_weights(native, 0)
    reference = build_tower(dataclasses.replace(TINY, image_size=48)).eval()
    table = OURS.resize(native.positional_embedding, 1, (6, 6))
    reference.load_state_dict({**native.state_dict(), "positional_embedding": table})
    check_against_open_clip(teacher, reference, crops_u8(2, 32), [1, 3])
    assert teacher(crops_u8(2, 32), [3]).tokens.shape == (2, 1, 37, 48)
