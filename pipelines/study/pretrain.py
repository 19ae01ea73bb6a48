"""Train the study's teacher, in the architecture of the teacher `demo`, so that `--teacher demo --weights FILE` loads it.

Two kinds. `self` learns without labels: two random crops of an image are to be alike and unlike those of the other images of the
batch (NT-Xent of SimCLR, Chen et al. 2020), with half of the patches left out of each (FLIP, Li et al. 2023), which makes a step
half as dear. `supervised` learns the classes. In both, CLS and the mean of the patches have a head each and the same loss, so
that patches, too, learn what they are part of. Only images of train/ are read; a tenth is held out and measures the result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from student.errors import RunError, RunMismatchError
from student.evals import knn_accuracy
from student.evals.schedule import rate_at
from student.seeds import position_seed
from teacher_cache.crops.cutting import load_image
from teacher_cache.crops.images import read_image, scan
from teacher_cache.errors import UsageError
from teacher_cache.files.claims import claimed
from teacher_cache.files.durable import aside_path, make_folder, publish, write_whole
from teacher_cache.teachers import TEACHERS
from teacher_cache.teachers.timm_vit import build_vit

from .augment import random_crops
from .subset import drawn_of_each, fingerprint

# B images a step, N patches, D width

HELD_OUT = 10
"""One image in so many of each class is never learned from; choices were made by these alone."""
MOST_VOTERS = 4000
EVERY = 100
"""Steps between checkpoints."""


@dataclass(frozen=True)
class Pretraining:
    """All that the weights depend on, beside the images."""

    kind: Literal["self", "supervised"] = "self"
    epochs: int = 8
    batch_size: int = 256
    """At most the images there are."""
    rate: float = 2e-3
    """Peak learning rate; AdamW, warm-up over a tenth of the steps, cosine to 0."""
    weight_decay: float = 0.05
    keep: float = 0.5
    """Share of the patches that a crop shows to the `self` kind."""
    temperature: float = 0.2
    smoothing: float = 0.1
    """Of the labels."""
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("self", "supervised"):
            raise UsageError(f"A teacher is self or supervised, not {self.kind!r}.")
        if self.epochs < 1 or self.batch_size < 2:
            raise UsageError(f"epochs={self.epochs}, batch_size={self.batch_size}: give at least one epoch of two images a step.")


@dataclass(frozen=True)
class Images:
    """uint8 [n, 3, 32, 32], int64 [n] classes."""

    pixels: Tensor
    labels: Tensor

    def rows(self, rows: Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


def read_folder(folder: Path) -> Images:
    """All images of a folder of class folders, resized to the teacher's side if they have another."""
    images, side = scan(folder).images, TEACHERS["demo"].image_size
    if len(images.classes) < 2:
        raise UsageError(f"{folder}: a teacher needs images of two classes or more. Give a folder of class folders.")
    pixels = np.empty((len(images.names), side, side, 3), "uint8")
    for row, name in enumerate(images.names):
        image = load_image(read_image(folder, name), name)
        pixels[row] = image if image.size == (side, side) else image.resize((side, side))
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(images.labels.astype("int64")))


class Learner(nn.Module):
    """The ViT with a head on CLS and one on the mean of the patches."""

    def __init__(self, plan: Pretraining, n_classes: int):
        super().__init__()
        entry = TEACHERS["demo"]
        self.plan, self.vit = plan, build_vit(entry)
        with torch.no_grad():
            self.vit.pos_embed[0, 1:] = 0.5 * build_sincos2d_pos_embed(list(entry.grid), dim=entry.dim)
        self.heads = nn.ModuleList(self._head(entry.dim, n_classes) for _ in range(2))
        self.register_buffer("mean", torch.tensor(entry.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(entry.std).view(3, 1, 1), persistent=False)

    def _head(self, dim: int, n_classes: int) -> nn.Module:
        if self.plan.kind == "supervised":
            return nn.Linear(dim, n_classes)
        layers = [nn.Linear(dim, 4 * dim), nn.BatchNorm1d(4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim)]
        return nn.Sequential(*layers)

    def tokens(self, crops: Tensor, order: Tensor | None = None) -> Tensor:
        """float32 [B, 1+n, D] behind the final norm, of crops in 0..1. order: int64 [B, n], the patches shown; None: all."""
        vit = self.vit
        patches = vit.patch_embed((crops - self.mean) / self.std) + vit.pos_embed[:, 1:]  # [B, N, D]
        if order is not None:
            patches = patches.gather(1, order[..., None].expand(-1, -1, patches.shape[-1]))
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return vit.norm(vit.blocks(torch.cat([cls, patches], 1)))

    def loss(self, images: Images, generator: torch.Generator) -> Tensor:
        pixels = images.pixels.float() / 255
        if self.plan.kind == "supervised":
            tokens = self.tokens(random_crops(pixels, generator))
            features = (tokens[:, 0], tokens[:, 1:].mean(1))
            return sum(F.cross_entropy(head(x), images.labels, label_smoothing=self.plan.smoothing)
                       for head, x in zip(self.heads, features, strict=True)) / 2  # fmt: skip
        crops = torch.cat([random_crops(pixels, generator) for _ in range(2)])
        n_patches = self.vit.patch_embed.num_patches
        noise = torch.rand(len(crops), n_patches, generator=generator, device=crops.device)
        tokens = self.tokens(crops, noise.argsort(1)[:, : max(1, round(self.plan.keep * n_patches))])
        features = (tokens[:, 0], tokens[:, 1:].mean(1))
        return sum(nt_xent(head(x), self.plan.temperature) for head, x in zip(self.heads, features, strict=True)) / 2


def nt_xent(projected: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of 2 B projections, of which i and i + B are of one image; mean over all of them."""
    unit = F.normalize(projected.float(), dim=1)
    n = len(unit)
    logits = unit @ unit.T / temperature
    logits.fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, (torch.arange(n, device=unit.device) + n // 2) % n)


def pretrain(
    plan: Pretraining,
    train: Path,
    out: Path,
    *,
    about: dict | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, float, float], None] = lambda step, steps, loss, seconds: None,
    most_steps: int | None = None,
) -> dict | None:
    """Train by `plan` on the images of `train`, or go on; the facts that are kept beside the weights, None if stopped early.

    out: folder; the weights become `out`/teacher.safetensors, the facts `out`/teacher.json. about: what else is to be kept of it.
    progress: told (steps done, all steps, mean loss since it was told last, seconds in all). most_steps: stop there.
    Raises RunMismatchError where `out` holds another training, RunError where what is left of one is damaged, UsageError for
    images that cannot be learned from.
    """
    facts_path = out / "teacher.json"
    identity = {"plan": asdict(plan), "images": fingerprint(train)}
    if facts_path.exists():
        facts = json.loads(facts_path.read_text())
        _require_same(out, facts, identity)
        return facts
    make_folder(out)
    with claimed(out / "teacher.lock", f"The teacher {out}"):
        images = read_folder(train)
        n_classes = int(images.labels.max()) + 1
        held_out = torch.from_numpy(drawn_of_each(images.labels.numpy(), len(images) // HELD_OUT, plan.seed, "teacher held out"))
        learned = torch.ones(len(images), dtype=torch.bool).index_fill_(0, held_out, False).nonzero()[:, 0]
        if len(learned) < 4:
            raise UsageError(f"{train}: {len(learned):,} images are left to learn from. Give more.")
        run = _Run(plan, images.rows(learned), n_classes, out, identity, device)
        if not run.train(progress, most_steps):
            return None
        model = run.model.cpu().eval()
        voters = learned
        if len(learned) > MOST_VOTERS:
            drawn = drawn_of_each(images.labels[learned].numpy(), MOST_VOTERS, plan.seed, "teacher voters")
            voters = learned[torch.from_numpy(drawn)]
        measured = held_out_accuracy(model, images.rows(voters), images.rows(held_out))
        facts = {**identity, **(about or {}), "seconds": round(run.seconds, 1), "torch": torch.__version__,
                 "threads": torch.get_num_threads(), "learned_from": len(learned), "held_out": len(held_out),
                 "loss": run.losses, "held_out_accuracy": measured}  # fmt: skip
        state = {name: tensor.detach().contiguous() for name, tensor in model.vit.state_dict().items()}
        write_whole(out / "teacher.safetensors", save(state, metadata={"facts": json.dumps(facts, sort_keys=True)}))
        write_whole(facts_path, json.dumps(facts, indent=1, sort_keys=True).encode())
        run.state_path.unlink(missing_ok=True)
        return facts


class _Run:
    """The loop. Everything random in a step is a function of (seed, step), so that one that goes on is one that never stopped."""

    def __init__(self, plan: Pretraining, images: Images, n_classes: int, out: Path, identity: dict, device: str):
        torch.manual_seed(plan.seed)
        self.plan, self.images, self.device, self.identity = plan, images, torch.device(device), identity
        self.model = Learner(plan, n_classes).to(self.device).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.ndim in (2, 4)], "weight_decay": plan.weight_decay},
                  {"params": [p for p in parameters if p.ndim not in (2, 4)], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
        self.batch_size = min(plan.batch_size, len(images))
        self.steps_per_epoch = len(images) // self.batch_size
        self.steps, self.step, self.seconds, self.losses = plan.epochs * self.steps_per_epoch, 0, 0.0, []
        self.state_path = out / "training.pt"
        if self.state_path.exists():
            try:
                state = torch.load(self.state_path, map_location=self.device, weights_only=True)
            except Exception as error:  # of zip, of pickle, of torch
                raise RunError(f"{self.state_path} is damaged ({error}). Delete it: the training starts anew.") from error
            _require_same(out, state["identity"], identity)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def train(self, progress, most_steps: int | None) -> bool:
        """Whether it came to the end."""
        last, total, n = self.steps if most_steps is None else min(most_steps, self.steps), 0.0, 0
        before, order, order_of = time.monotonic(), None, -1
        while self.step < last:
            epoch, place = divmod(self.step, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = torch.randperm(len(self.images), generator=self._generator("order", epoch, "cpu")), epoch
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            total, n = total + self._take(rows), n + 1
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            if self.step % EVERY == 0 or self.step == last:
                self.losses.append(round(total / n, 4))
                progress(self.step, self.steps, total / n, self.seconds)
                total, n = 0.0, 0
                self._save()
        return self.step == self.steps

    def _take(self, rows: Tensor) -> float:
        rate = rate_at(self.step / self.steps, self.plan.rate, 1.0, 0.1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        some = self.images.rows(rows)
        batch = Images(some.pixels.to(self.device), some.labels.to(self.device))
        loss = self.model.loss(batch, self._generator("step", self.step, self.device))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _generator(self, purpose: str, position: int, device) -> torch.Generator:
        return torch.Generator(device).manual_seed(position_seed(f"teacher {purpose}", self.plan.seed, position) % 2**63)

    def _save(self) -> None:
        aside = aside_path(self.state_path)
        torch.save({"identity": self.identity, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "step": self.step, "seconds": self.seconds, "losses": self.losses}, aside)  # fmt: skip
        publish(aside, self.state_path)


@torch.no_grad()
def held_out_accuracy(model: Learner, voters: Images, asked: Images, n_neighbours: int = 20) -> dict[str, float]:
    """kNN accuracy in 0..1 of whole images, for CLS and for the mean of the patches (DINO's protocol)."""
    device = model.mean.device

    def features(images: Images) -> tuple[Tensor, Tensor]:
        parts = [model.tokens(part.to(device).float() / 255) for part in images.pixels.split(250)]
        tokens = torch.cat(parts)
        return tokens[:, 0], tokens[:, 1:].mean(1)

    sides = zip(("cls", "mean"), features(voters), features(asked), strict=True)
    return {name: knn_accuracy(of, voters.labels, to, asked.labels, n_neighbours) for name, of, to in sides}


def _require_same(out: Path, found: dict, identity: dict) -> None:
    odd = [name for name, value in identity.items() if found.get(name) != value]
    if odd:
        raise RunMismatchError(
            f"{out} holds a teacher of other {' and '.join(odd)}: {found.get(odd[0])}, and asked for is {identity[odd[0]]}. "
            "Give the same settings and images, or another --out."
        )
