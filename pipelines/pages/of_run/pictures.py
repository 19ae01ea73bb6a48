"""What the student of a run makes of a few crops, beside what its teacher makes of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from student.batch import Batch, Mask, Needs, Targets
from student.config import AlignConfig, ContrastConfig, CosineConfig, ReconstructConfig
from student.files.checkpoint import load_student
from student.masking import draw_noise
from student.modules.attention import cls_attention
from student.modules.model import Student
from student.modules.pixels import PIXEL_MEAN, PIXEL_STD, normalise
from student.modules.targets import patchify, teacher_output, unit_length
from teacher_cache.cache import Cache, View
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import NotInCacheError, TeacherCacheError
from teacher_cache.format.layout import store_file_name
from teacher_cache.format.spec import ATTENTION_SOURCES
from teacher_cache.store.reader import StoreReader

from ...feed.teacher_values import teacher_head, teacher_shape
from ..maps import colours_of_tokens, hide, over_crop
from .run_facts import RunFacts

# B crops, N patches, C 1 with CLS else 0, D width, p side of a patch in pixels

JPEG_FROM = 96
"""Side of a picture, pixels, from which it is a JPEG in the page; smaller ones stay exact."""


@dataclass(frozen=True)
class Panel:
    """One picture of one crop."""

    title: str
    pixels: np.ndarray
    """uint8 [rows, columns, 3]"""


@dataclass(frozen=True)
class CropShown:
    row: int
    class_name: str
    panels: list[Panel]


@dataclass(frozen=True)
class Pictures:
    crops: list[CropShown]
    about: list[tuple[str, str]]
    """(title of a panel, what it shows), in the order of the panels."""
    step: int
    """Completed steps of the checkpoint that was asked."""


def look(run: RunFacts, cache_dir: Path | None, n_crops: int) -> Pictures:
    """Pictures of the first crops of view 0, by the newest checkpoint, on the CPU.

    cache_dir: where the cache of the run lies; None: where it lay. Raises NotInCacheError, and what opening a cache raises, if
    the crops or targets of this very run are not to be had; RunError for a damaged checkpoint.
    """
    if not run.checkpoints:
        raise NotInCacheError("The run has no checkpoint yet.")
    view, stores = _open(run, cache_dir)
    student, config, step = load_student(
        next(reversed(run.checkpoints)), tuple(teacher_shape(store.teacher, store.spec.visible or None) for store in stores)
    )
    rows = _rows(view, stores, n_crops)
    pixels = CropReader(view.path).read(rows)  # uint8 [B, H, W, 3]
    targets = tuple(_targets(store, needs, rows) for store, needs in zip(stores, student.needs, strict=True))
    batch = Batch(normalise(torch.from_numpy(pixels)), torch.from_numpy(rows), None, targets)
    with torch.no_grad():
        columns = list(_columns(student, config, batch, pixels, stores))
    images = view.cache.images()
    shown = []
    for i, row in enumerate(rows):
        label = images.labels[row]
        panels = [Panel(title, pictures[i]) for title, _, pictures in columns]
        shown.append(CropShown(int(row), images.classes[label] if label >= 0 else "", panels))
    return Pictures(shown, [(title, about) for title, about, _ in columns], step)


def _open(run: RunFacts, cache_dir: Path | None) -> tuple[View, list[StoreReader]]:
    """View 0 of the cache of the run, and the stores of its teachers there."""
    known = cache_dir or run.description.get("data_from")
    if not known:
        raise NotInCacheError("The run does not say where its cache lies. Give --cache CACHE.")
    try:
        cache = Cache(Path(known))
    except TeacherCacheError as error:
        raise NotInCacheError(
            f"The cache of the run is not to be had: {error} Give the place where it lies now with --cache."
        ) from error
    identity = run.description["identity"]
    if cache.crops_id != identity.get("crops_id"):
        raise NotInCacheError(
            f"{known} holds the crops {cache.crops_id[:12]}, the run was trained on {str(identity.get('crops_id'))[:12]}. "
            "Give the cache of the run with --cache."
        )
    view, stores = cache.finished_view(0), []
    for teacher in identity.get("teachers", []):
        name = teacher.get("store") or store_file_name(teacher["live"])
        if name not in view.store_names():
            raise NotInCacheError(f"{known} has no targets of {name}, which the run learned from.")
        store = StoreReader(view.store_path(name))
        if store.teacher.weights_sha256 != teacher["weights_sha256"]:
            raise NotInCacheError(f"{known} has targets of {name} with other weights than those the run learned from.")
        stores.append(store)
    return view, stores


def _rows(view: View, stores: Sequence[StoreReader], n_crops: int) -> np.ndarray:
    """The first rows that every store has; rows are in random order, so they are a fair sample."""
    there = np.ones(view.cache.n_images, bool)
    for store in stores:
        there &= np.repeat(store.finished, store.spec.shard_rows)[: len(there)]
    rows = np.flatnonzero(there)[:n_crops]
    if not len(rows):
        raise NotInCacheError(f"{view.path} has no targets any more.")
    return rows


def _targets(store: StoreReader, needs: Needs, rows: np.ndarray) -> Targets:
    """What the student reads, and in any case the last block that is stored and the attention, if there is one."""
    offsets = sorted({*needs.layers, store.spec.layers[-1] - store.teacher.depth - 1})
    tokens = np.stack([store.tokens(rows, store.teacher.depth + 1 + offset) for offset in offsets], 1)  # [B, L, C+N or C+K, D]
    attention = torch.from_numpy(store.read("attention", rows)) if store.spec.attention else None
    index = torch.from_numpy(store.read("index", rows)).long() if store.spec.visible else None
    head = teacher_head(store.head, torch.device("cpu"))
    return Targets(torch.from_numpy(tokens).float(), tuple(offsets), store.teacher.has_cls, attention, head, index)


def _columns(student: Student, config, batch: Batch, pixels: np.ndarray, stores: Sequence[StoreReader]):
    """(title, what it shows, one picture a crop) of everything that this student can be asked."""
    grid = config.backbone.grid
    mask = student.draw_mask(batch, draw_noise(config.seed, 0, len(pixels), student.n_patches))
    yield "crop", "the crop, as teacher and student get it", list(pixels)
    share = mask.drop.shape[1] / student.n_patches
    masked = [hide(crop, hidden, grid) for crop, hidden in zip(pixels, mask.is_hidden.numpy(), strict=True)]
    yield "visible", f"a draw of the run's masks ({config.mask.kind}): {share:.0%} of the patches are hidden", masked

    predictions = _predictions(student, config, batch, mask)
    for objective in config.objectives:
        if isinstance(objective, ReconstructConfig):
            about = "hidden patches as the student paints them, with the true mean and contrast of each; visible ones as they are"
            yield "reconstruction", about, _reconstructions(batch.images, predictions[objective.name], mask)
        elif objective.name in predictions:
            store, targets = stores[objective.teacher], batch.targets[objective.teacher]
            yield from _tokens_beside(objective, store, targets, predictions[objective.name], mask, grid)

    features = student.backbone.encode_all(batch.images)[:, -student.n_patches :]
    about = "the student's own features of all patches, their first three principal components as colours"
    yield "features", about, _on_grid(colours_of_tokens(features.numpy())[0], grid)

    theirs = [
        (store, targets.attention) for store, targets in zip(stores, batch.targets, strict=True) if targets.attention is not None
    ]
    own = cls_attention(student.backbone, batch.images)
    for store, attention in theirs[:1]:
        about = f"{ATTENTION_SOURCES[store.teacher.attention_source]} attention of {store.teacher.name}"
        yield "attention: teacher", about, _heat(pixels, attention, store.teacher.grid)
    if own is not None:
        alike = ""
        if theirs and theirs[0][1].shape == own.shape:
            together = [np.corrcoef(a, b)[0, 1] for a, b in zip(own.numpy(), theirs[0][1].numpy(), strict=True)]
            alike = f"; correlation with the teacher's {np.mean(together):.2f} on average"
        yield "attention: student", f"what CLS of the student attends to, last block{alike}", _heat(pixels, own, grid)


def _predictions(student: Student, config, batch: Batch, mask: Mask) -> dict[str, Tensor]:
    """What the heads of the objectives give for the batch, by the objective's name; of Align the head of the last block."""
    encoded = student.backbone(batch.images, mask)
    predictions: dict[str, Tensor] = {}
    for asked in config.objectives:
        if isinstance(asked, ContrastConfig):
            continue  # compares whole crops with each other: there is no token to show
        objective = student.objectives[asked.name]
        head = objective.adaptors[-1] if isinstance(asked, AlignConfig) else objective.head

        def keep(module, inputs, output, name=asked.name) -> None:
            predictions[name] = output.float()

        hook = head.register_forward_hook(keep)
        try:
            objective(encoded, batch, mask)
        finally:
            hook.remove()
    return predictions


def _tokens_beside(objective, store: StoreReader, targets: Targets, predicted: Tensor, mask: Mask, grid: tuple[int, int]):
    """Two columns: the teacher's patch tokens of its last block, and the student's predictions of them, in the same colours.

    predicted: [B, C+n, D]; n is all patches (Cosine) or the visible ones (Mimic, Align), which predict nothing at hidden patches.
    """
    true = _patch_tokens(targets, mask)
    if isinstance(objective, CosineConfig):  # compares directions in the teacher's output space
        true, predicted = unit_length(teacher_output(true, targets.head)), unit_length(predicted)
    n_patches = true.shape[1]
    at_all = predicted.shape[1] >= n_patches
    if at_all:
        predicted = predicted[:, -n_patches:]
    else:
        index = mask.keep[..., None].expand(-1, -1, true.shape[-1])
        predicted = torch.full_like(true, torch.nan).scatter(1, index, predicted[:, -mask.keep.shape[1] :])
    cosine = float((unit_length(predicted) * unit_length(true)).sum(-1).nanmean())

    colours, share = colours_of_tokens(np.concatenate([true.numpy(), predicted.numpy()]))  # [2B, N, 3]
    theirs, own = np.split(colours, 2)
    about = (
        f"patch tokens of {store.teacher.name}, last block: three principal components as colours ({share:.0%} of the variance)"
    )
    yield f"teacher: {objective.kind}", about, _on_grid(theirs, grid)
    where = "at every patch, from the visible ones" if at_all else "at the visible patches"
    about = f"the same tokens as the student predicts them {where}, in the same colours; cosine {cosine:.2f} on average"
    yield f"predicted: {objective.kind}", about, _on_grid(own, grid)


def _patch_tokens(targets: Targets, mask: Mask) -> Tensor:
    """The teacher's patch tokens of its last block, float32 [B, N, D]; NaN for those not stored."""
    tokens, index = targets.layer(-1)[:, int(targets.has_cls) :].float(), targets.index
    if index is None:
        return tokens
    n_patches = mask.keep.shape[1] + mask.drop.shape[1]
    nothing = tokens.new_full((len(tokens), n_patches, tokens.shape[-1]), torch.nan)
    return nothing.scatter(1, index[..., None].expand_as(tokens), tokens)


def _reconstructions(images: Tensor, predicted: Tensor, mask: Mask) -> list[np.ndarray]:
    """uint8 pictures. predicted: normalised pixels of the hidden patches, [B, n_drop, p * p * 3]."""
    side = round((predicted.shape[-1] / 3) ** 0.5)
    patches = patchify(images, side)  # [B, N, p * p * 3]
    index = mask.drop[..., None].expand(-1, -1, patches.shape[-1])
    variance, mean = torch.var_mean(patches.gather(1, index), dim=-1, keepdim=True)
    painted = patches.scatter(1, index, predicted * (variance + 1e-6).sqrt() + mean)
    rows = images.shape[2] // side
    pixels = (
        painted.unflatten(1, (rows, -1)).unflatten(3, (side, side, 3)).permute(0, 1, 3, 2, 4, 5)
    )  # [B, rows, p, columns, p, 3]
    pixels = pixels.flatten(3, 4).flatten(1, 2) * torch.tensor(PIXEL_STD) + torch.tensor(PIXEL_MEAN)
    return list((255 * pixels).round().clamp(0, 255).byte().numpy())


def _on_grid(colours: np.ndarray, grid: tuple[int, int]) -> list[np.ndarray]:
    return list(colours.reshape(-1, *grid, 3))


def _heat(pixels: np.ndarray, attention: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
    levels = attention / attention.amax(1, keepdim=True).clamp_min(1e-12)
    return [over_crop(crop, level, grid) for crop, level in zip(pixels, levels.numpy(), strict=True)]


def encoded_picture(pixels: np.ndarray) -> tuple[bytes, str]:
    """A picture as bytes for a page, and their media type."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if max(image.size) >= JPEG_FROM:
        image.save(buffer, "JPEG", quality=85)
        return buffer.getvalue(), "image/jpeg"
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "image/png"
