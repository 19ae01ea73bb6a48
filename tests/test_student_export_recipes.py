"""The recipes for other libraries: names that come out right, and the papers' numbers in files and table alike."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from student import ViTConfig
from student.exports.layouts import exported
from student.modules.backbones import build_backbone

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
TABLE = {row[0]: row for row in re.findall(r"\| \[(\w+\.py)\].*?\| ([\d.e-]+) \| \.(\d) \| (\d+) \|",
                                           (RECIPES / "README.md").read_text())}  # fmt: skip
"""File -> (file, learning rate, layer decay in tenths, batch) of the table in the README."""


def test_names_of_mmsegmentation(tmp_path, monkeypatch):
    """for_mmseg.py renames every weight but the final norm, as MMSegmentation's MAE has them, and changes no value."""
    config = ViTConfig(image_size=16, patch_size=4, dim=16, depth=1, heads=2)
    _, tensors = exported(config, build_backbone(config).state_dict(), "torch")
    torch.save({"model": tensors}, tmp_path / "a.pth")
    monkeypatch.setattr(sys, "argv", ["for_mmseg.py", str(tmp_path / "a.pth"), str(tmp_path / "b.pth")])
    runpy.run_path(str(RECIPES / "for_mmseg.py"), run_name="__main__")
    found = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    layers = {"ln1": "norm1", "ln2": "norm2", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "ffn.layers.0.0": "mlp.fc1",
              "ffn.layers.1": "mlp.fc2"}  # fmt: skip
    expected = {"cls_token": "cls_token", "pos_embed": "pos_embed"}
    for end in ("weight", "bias"):
        expected |= {f"layers.0.{there}.{end}": f"blocks.0.{here}.{end}" for there, here in layers.items()}
        expected[f"patch_embed.projection.{end}"] = f"patch_embed.proj.{end}"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[there], tensors[here]) for there, here in expected.items())


def test_settings_of_upernet():
    """The file has the numbers of the table, and eight GPUs make the batch."""
    values = runpy.run_path(str(RECIPES / "upernet_milan_b.py"))
    _, rate, decay, batch = TABLE["upernet_milan_b.py"]
    assert values["optim_wrapper"]["optimizer"]["lr"] == float(rate)
    assert values["optim_wrapper"]["paramwise_cfg"]["layer_decay_rate"] == int(decay) / 10
    assert values["train_dataloader"]["batch_size"] * 8 == int(batch)


@pytest.mark.parametrize("name", ["vitdet_maskalign_b.py", "vitdet_mr_mae_b.py"])
def test_settings_of_vitdet(name):
    """Where Detectron2 is installed, its files have the numbers of the table."""
    config = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed").LazyConfig.load(str(RECIPES / name))
    _, rate, decay, batch = TABLE[name]
    assert (config.optimizer.lr, config.dataloader.train.total_batch_size) == (float(rate), int(batch))
    assert config.optimizer.params.lr_factor_func.keywords["lr_decay_rate"] == int(decay) / 10
    assert config.train.max_iter == 25 * 118_000 // int(batch)
