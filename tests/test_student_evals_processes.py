"""Fine-tuning in two processes is that of one. A file of its own: what it imports, each of the processes does."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors import safe_open

from student import ViTConfig
from student.devices.distributed import processes
from student.evals.finetuning.classifier import Classifier
from student.evals.finetuning.loop import FineTuning
from student.evals.finetuning.saved import NAME
from student.evals.finetuning.settings import FineTune
from student.evals.subject import Subject
from student.modules.backbones import build_backbone

VIT = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2)
SETTINGS = FineTune(base_rate=1e-2, epochs=2, warmup_epochs=1, batch_size=8, mixup=0, cutmix=0, drop_path=0)


class Images:
    """Twenty images of noise in three classes."""

    size, mean, std = 16, (0.5,) * 3, (0.5,) * 3

    def __init__(self, rows=range(20)):
        self._rows, self.labels = list(rows), np.array(list(rows)) % 3

    def __len__(self) -> int:
        return len(self._rows)

    def part(self, number: int, of: int) -> Images:
        return Images(self._rows[number::of])

    def image(self, index: int) -> Image.Image:
        levels = np.random.default_rng(self._rows[index]).integers(0, 256, (20, 20, 3))
        return Image.fromarray(levels.astype("uint8"))

    def __iter__(self):
        for index in range(len(self)):
            pixels = np.asarray(self.image(index).resize((16, 16)), "float32") / 127.5 - 1
            yield torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.tensor([self.labels[index]])


def tune(folder: Path) -> list[dict]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    backbone = build_backbone(VIT).eval()
    backbone.grid = VIT.grid
    subject = Subject("tiny", "", "", backbone, 16, Images.mean, Images.std)
    identity = {"settings": dataclasses.asdict(SETTINGS)}
    return FineTuning(Classifier(subject, 3, SETTINGS), Images(), Images(), SETTINGS, 3, folder, identity).run()


def one_of_two(place: int, folder: str, port: int) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(place), "WORLD_SIZE": "2", "LOCAL_RANK": str(place), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    with processes("cpu"):
        tune(Path(folder))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Weights, moments, losses and accuracies of a batch that two processes share are those of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (str(tmp_path / "two"), port), nprocs=2)
    one, there = tune(tmp_path / "one"), {}
    for name in ("one", "two"):
        with safe_open(tmp_path / name / NAME, "pt") as file:
            there[name] = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["finetune"])  # noqa: SIM118
    assert there["one"][0].keys() == there["two"][0].keys()
    for key, tensor in there["one"][0].items():
        torch.testing.assert_close(there["two"][0][key], tensor, atol=2e-5, rtol=2e-3, msg=key)
    found = there["two"][1]["epochs"]
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in one], rel=1e-5)
    assert [e["top1"] for e in found] == [e["top1"] for e in one]
