"""student-train --init: an encoder begins from weights that are there; what fits and what does not is said and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from pipelines.pages.of_run.run_facts import read_run
from pipelines.pages.of_run.run_report import _state
from student import ConfigError, MCMAEConfig, RunError, RunMismatchError, SwinConfig, ViTConfig
from student.cli.export import export
from student.cli.train import train
from student.exports import initial
from student.exports.initial import begin
from student.exports.layouts import exported
from student.files.checkpoint import describe_checkpoint, latest_checkpoint, load_backbone
from student.files.run_directory import read_description
from student.modules.backbones import build_backbone

TINY = ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, heads=3)
"""What --tiny makes of a ViT for these crops."""


def weights_of(config, seed: int = 3) -> dict[str, torch.Tensor]:
    """Weights of an encoder, of which no two are the same."""
    backbone, generator = build_backbone(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone.state_dict()


def mae_file(path: Path, config=TINY) -> Path:
    """As MAE publishes the file with its decoder."""
    torch.save({"model": weights_of(config) | {"mask_token": torch.ones(1, 1, 8), "decoder_pred.weight": torch.ones(4)}}, path)
    return path


def command(cache, out: Path, *more, code: int = 0) -> str:
    arguments = ["--cache", cache.path, "--preset", "mae-s16", "--tiny", "--set", "backbone.patch_size=8", "--out", out, *more]
    result = CliRunner().invoke(train, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output


def step_zero(monkeypatch) -> None:
    """Let the first step change nothing, so that a checkpoint shows what a run began from."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)


def test_a_run_begins_from_maes_file(shared_cache, tmp_path, monkeypatch):
    """The encoder has the file's weights, names that do not fit are said, and config.json and checkpoint have all that."""
    step_zero(monkeypatch)
    given, out = mae_file(tmp_path / "mae.pth"), tmp_path / "run"
    said = command(shared_cache, out, "--init", given, "--max-steps", "1")
    digest = hashlib.sha256(given.read_bytes()).hexdigest()
    assert f"30 of 30 weights of the encoder are those of mae.pth, sha256 {digest[:12]}" in said
    assert "in it and left out: decoder_pred.weight, mask_token" in said

    checkpoint = latest_checkpoint(out)
    found, expected = load_backbone(checkpoint)[0].state_dict(), weights_of(TINY)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    record = describe_checkpoint(checkpoint).init
    assert record == read_description(out)["init"]
    assert (record["from"], record["sha256"], record["n_fitted"]) == ("mae.pth", digest, 30)
    assert dict(_state(read_run(out)))["begun from"] == f"mae.pth, sha256 {digest[:12]}"
    assert record["left_out"] == ["decoder_pred.weight", "mask_token"] and str(tmp_path) not in json.dumps(record)


def test_a_run_that_goes_on_does_not_read_it_again(shared_cache, tmp_path):
    """With a checkpoint the file may be gone, --init given again or not; the run is to the bit what it is undisturbed."""
    given = mae_file(tmp_path / "mae.pth")
    command(shared_cache, tmp_path / "whole", "--init", given)
    out = tmp_path / "run"
    command(shared_cache, out, "--init", given, "--max-steps", "1")
    given.unlink()
    assert "weights of the encoder" not in command(shared_cache, out, "--init", given, "--max-steps", "3")
    command(shared_cache, out)
    whole, found = (load_backbone(latest_checkpoint(run))[0].state_dict() for run in (tmp_path / "whole", out))
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert describe_checkpoint(latest_checkpoint(out)).init["from"] == "mae.pth"


def test_a_run_is_what_it_was_begun_from(shared_cache, tmp_path):
    """Another --init, or one for a run of random weights, is refused; one that has no checkpoint needs the very same again."""
    given, other = mae_file(tmp_path / "mae.pth"), mae_file(tmp_path / "other.pth")
    run, plain = tmp_path / "run", tmp_path / "plain"
    command(shared_cache, run, "--init", given, "--max-steps", "1")
    command(shared_cache, plain, "--max-steps", "1")
    assert "was begun from mae.pth, not from other.pth" in command(shared_cache, run, "--init", other, code=2)
    assert "was begun from random weights, not from mae.pth" in command(shared_cache, plain, "--init", given, code=2)
    latest_checkpoint(run).unlink()
    assert "give --init with it again" in command(shared_cache, run, code=2)
    given.write_bytes(mae_file(tmp_path / "changed.pth", replace(TINY, positions="moco")).read_bytes())
    assert "is not what" in command(shared_cache, run, "--init", given, code=2)


def test_what_does_not_fit_is_refused(shared_cache, tmp_path):
    """Another size, another number of heads, foreign names, no numbers, nothing there: a sentence each, and no run is begun."""
    out, path = tmp_path / "run", tmp_path / "a.safetensors"

    def refused(message: str, init=path) -> None:
        assert message in " ".join(command(shared_cache, out, "--init", init, code=1).split())
        assert not out.exists()

    save_file(weights_of(replace(TINY, dim=96)), path)
    refused("does not fit this encoder in 30 of its weights: blocks.0.attn.proj.bias is [96] there, [48] here")
    save_file({"layer1.conv.weight": torch.ones(2)}, path)
    refused("holds none of the 30 weights of this encoder (vit): its names are layer1.conv.weight ...")
    save_file(weights_of(TINY) | {"norm.bias": torch.full((48,), float("nan"))}, path)
    refused("has values in norm.bias that are not finite")
    path.write_bytes(b"<html>")
    refused("cannot be read as weights")
    refused("There is no file", tmp_path / "none.pth")
    (tmp_path / "empty").mkdir()
    refused("holds no checkpoint of a run and no model of transformers", tmp_path / "empty")
    refused("timm gives no such weights (Unknown model (nonsense))", "timm:nonsense")


def test_another_run_and_its_export(shared_cache, tmp_path, monkeypatch):
    """A run, its checkpoint and each of its exports are the same beginning; a number of heads on record is compared."""
    first = tmp_path / "first"
    command(shared_cache, first, "--max-steps", "1")
    expected = load_backbone(latest_checkpoint(first))[0].state_dict()
    outs = {"timm": tmp_path / "a.safetensors", "torch": tmp_path / "a.pth", "hf": tmp_path / "a"}
    for layout, out in outs.items():
        assert CliRunner().invoke(export, [str(first), "-o", str(out), "--format", layout]).exit_code == 0
    for what in (first, latest_checkpoint(first), *outs.values()):
        backbone = build_backbone(TINY)
        record, _ = begin(str(what), backbone, TINY, tmp_path / "new")
        assert all(torch.equal(value, expected[name]) for name, value in backbone.state_dict().items()), what
        assert record["from"] == what.name and record["n_fitted"] == 30
        with pytest.raises(RunError, match=r"3 heads, this encoder has 6.*--set backbone.heads=3"):
            begin(str(what), build_backbone(TINY), replace(TINY, heads=6), tmp_path / "new")


def test_a_model_of_timm(tmp_path, monkeypatch):
    """A ViT of timm fits with its own position table, which is said; what is no plain ViT or Swin is refused."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: model)
    backbone = build_backbone(TINY)
    record, lines = begin("timm:vit", backbone, TINY, tmp_path / "run")
    assert record["from"] == "timm:vit" and any("position table is taken" in line for line in lines)
    assert torch.equal(backbone.pos_embed, model.pos_embed)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: torch.nn.Linear(1, 1))
    with pytest.raises(RunError, match="timm:x is a Linear"):
        begin("timm:x", backbone, TINY, tmp_path / "run")


def test_layer_scale_goes_where_there_is_none(tmp_path):
    """Weights with layer scale keep their function in an encoder without; an encoder with one says that it keeps its own."""
    scaled = replace(TINY, layer_scale=0.1)
    save_file(weights_of(scaled), tmp_path / "scaled.safetensors")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs, plain = build_backbone(scaled).eval(), build_backbone(TINY).eval()
    theirs.load_state_dict(weights_of(scaled))
    _, lines = begin(str(tmp_path / "scaled.safetensors"), plain, TINY, tmp_path / "run")
    assert any("multiplied into the layers before" in line for line in lines)
    with torch.no_grad():
        assert torch.allclose(plain.encode_all(images), theirs.encode_all(images), rtol=1e-4, atol=1e-4)

    save_file(weights_of(TINY), tmp_path / "plain.safetensors")
    record, lines = begin(str(tmp_path / "plain.safetensors"), build_backbone(scaled), scaled, tmp_path / "run")
    assert record["new"] == [f"blocks.{block}.ls{branch}.gamma" for block in (0, 1) for branch in (1, 2)]
    assert any(line.startswith("not in it: blocks.0.ls1.gamma") for line in lines)


MCMAE = MCMAEConfig(image_size=16, strides=(2, 2, 1), dims=(8, 12, 16), depths=(1, 2, 2), heads=2)
SWIN = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=(1, 2), heads=(1, 2), window=4)


@pytest.mark.parametrize(("config", "layout"), [(MCMAE, "torch"), (SWIN, "timm")], ids=["mcmae", "swin"])
def test_other_encoders(tmp_path, config, layout):
    """MCMAE begins from its authors' layout, also of version 1 without CLS; Swin from timm's; what is not there stays new."""
    tensors = exported(config, weights_of(config), layout)[1]
    tensors.pop("cls_token", None)
    torch.save({"model": tensors}, tmp_path / "a.pth")
    backbone = build_backbone(config)
    record, _ = begin(str(tmp_path / "a.pth"), backbone, config, tmp_path / "run")
    expected = weights_of(config)
    new = {name for name in expected if name.startswith(("mask_token", "cls_token", "fuse"))}
    assert set(record["new"]) == new and not record["left_out"]
    found = backbone.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() - new)


def test_without_a_run_nothing_is_asked(tmp_path):
    """No --init, no record."""
    assert begin(None, build_backbone(TINY), TINY, tmp_path) == ({}, [])
    assert issubclass(RunMismatchError, RunError) and not issubclass(ConfigError, RunError)
    assert initial.name_of("timm:a/b") == "timm:a/b"
