"""Batches for a student: from a cache, or live from a teacher on the same pixels.

`CachedSource` never imports a teacher. `LiveSource` runs one on the spot on the very crops and with the very preprocessing that
extraction uses: the oracle of the tests, and the baseline of every speed claim.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from student.batch import Batch, Mask, Needs, Targets, TeacherHead, TeacherShape
from student.devices.distributed import local_processes
from student.devices.micro_batches import place_of
from student.masking.maskers import MasksAhead
from student.modules.pixels import PIXEL_MEAN, PIXEL_STD, PIXELS
from teacher_cache.cache import Cache, View
from teacher_cache.crops.beton import CropReader, read_checksums
from teacher_cache.errors import CacheCorruptError, MismatchError, NotInCacheError, UsageError
from teacher_cache.files.durable import canonical_json
from teacher_cache.format.spec import ARRAY_NAME, TeacherSpec
from teacher_cache.store.manifest import extract_command
from teacher_cache.store.reader import StoreReader
from teacher_cache.words import quoted

from .loader import JoinedLoader, Part, RawBatch, default_workers
from .order import Order

# B batch, N patches, C 1 with CLS else 0, D width, L layers, G groups of channels


def teacher_shape(spec: TeacherSpec, n_visible: int | None = None) -> TeacherShape:
    """What a student must know of its teacher. n_visible: patch tokens that a store keeps of it, None if all."""
    return TeacherShape(spec.name, spec.grid, spec.dim, spec.depth, spec.has_cls, spec.has_cls, spec.projection_dim, n_visible)


def stored_shape(cache: Cache, store_name: str) -> TeacherShape:
    """`teacher_shape` of the teacher behind a store of view 0."""
    store = cache.finished_view(0).store(store_name)
    return teacher_shape(store.teacher, store.spec.visible or None)


def teacher_head(arrays: dict[str, np.ndarray], device: torch.device) -> TeacherHead:
    """Final norm and projection, as a store or a teacher keeps them, on the device."""
    tensors = {name: torch.from_numpy(np.array(values)).to(device) for name, values in arrays.items()}
    return TeacherHead(tensors["gamma"], tensors["beta"], tensors.get("projection"))


def block_numbers(needs: Needs, teacher: TeacherSpec) -> list[int]:
    """The layers a student needs, counted from its teacher's last block, as block numbers from 1."""
    return [teacher.depth + 1 + offset for offset in needs.layers]


def normalise(images_u8: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], by ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(images_u8.device)
    return (images_u8.permute(0, 3, 1, 2).float() / 255 - mean) / std


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))


def complete_views(cache: Cache, store_names: Sequence[str], n_views: int | None) -> list[View]:
    """The views to train on: the first `n_views`, by default all. Each must be whole, with its stores.

    Raises NotInCacheError that gives the numbers and the command that mends it.
    """
    present = cache.views()
    wanted = n_views or len(present)
    if not present or wanted > len(present):
        raise NotInCacheError(
            f"{cache.path} has {len(present)} finished views, {wanted} are asked for. Make them: "
            f"teacher-cache crop --images DIR --views {wanted} {quoted(cache.path)}"
        )
    views = present[:wanted]
    for view, store_name in itertools.product(views, store_names):
        if store_name not in view.store_names():
            names = view.store_names()
            raise NotInCacheError(
                f"View {view.number} of {cache.path} has no targets of {store_name}; it has {', '.join(names) or 'none'}. "
                + _how_to_make(views, store_name)
            )
        reader = StoreReader(view.store_path(store_name))
        if not reader.is_complete:
            rows = sum(len(reader.spec.rows_of(int(shard))) for shard in np.flatnonzero(reader.finished))
            raise NotInCacheError(
                f"View {view.number} of {cache.path} is not complete: {rows:,} of {len(reader):,} rows of {store_name} are "
                f"there. Finish it: {extract_command(cache.path, store_name, reader.manifest)}"
            )
        view.require_own(reader.manifest)
        if reader.store.shared_sha256 != views[0].store(store_name).shared_sha256:
            raise CacheCorruptError(
                f"View {view.number} of {cache.path} has targets of {store_name} that were quantised otherwise than view "
                f"{views[0].number}'s. Delete {reader.path} and extract it again."
            )
    return views


def _how_to_make(views: list[View], store_name: str) -> str:
    """What to do about a view that lacks a store, as a sentence."""
    having = [view for view in views if store_name in view.store_names()]
    if having:
        command = extract_command(views[0].cache.path, store_name, having[0].store(store_name).manifest)
        return f"Make them: {command}; or train on fewer views: --views {len(having)}."
    command = f"teacher-cache extract --teacher NAME --weights PATH --name {quoted(store_name)} {quoted(views[0].cache.path)}"
    return f"Make them: {command}; or choose one with --teacher."


class CropSource:
    """Crops without targets, in the order of the run; the part that cached and live sources share.

    rank, world: of `world` processes that share each step of `batch_size` rows, this one takes its places (place_of).
    accumulate: micro-batches of this process in a step.  n_views: that the run is begun with.  Else: student.batch.BatchSource.
    Raises UsageError for a cache with fewer rows than a step takes, NotInCacheError for one without the views or targets asked
    for.
    """

    pixels = PIXELS

    def __init__(self, cache: Cache, *, batch_size: int, accumulate: int = 1, seed: int = 0, device="cpu",
                 n_views: int | None = None, workers: int | None = None, store_names: Sequence[str] = (),
                 rank: int = 0, world: int = 1):  # fmt: skip
        self.cache, self.device, self.accumulate = cache, torch.device(device), accumulate
        self.store_names = tuple(store_names)
        self.rank, self.world = rank, world
        self.views = complete_views(cache, store_names, n_views)
        if cache.n_images < batch_size:
            raise UsageError(
                f"{cache.path} has {cache.n_images:,} rows, one step takes {batch_size:,}. "
                f"Set a smaller batch: --set batch_size={cache.n_images}, or cache more images."
            )
        # the same order for every store and for none, so that methods can be compared on equal batches
        self.order = Order(cache.n_images, batch_size, seed)
        self.steps_per_epoch = self.order.steps_per_epoch
        self._views_from = [(0, len(self.views))]
        """(completed steps, views from then on), in order."""
        self.identity = {
            "crops_id": cache.crops_id,
            "views": [view.crops_sha256 for view in self.views],
            "order": {"seed": seed, "block_rows": self.order.block_rows, "window_blocks": self.order.window_blocks},
        }
        self._workers = workers or max(1, default_workers() // local_processes())
        self._loader: JoinedLoader | None = None
        self._opened: dict[int, tuple[CropReader, list[StoreReader]]] = {}
        self._labels = torch.from_numpy(cache.images().labels)

    def _open(self, view: View) -> tuple[CropReader, list[StoreReader]]:
        crops, crops_id = CropReader(view.path), read_checksums(view.path)["crops_id"]
        if (crops_id, len(crops)) != (self.cache.crops_id, self.cache.n_images):
            raise CacheCorruptError(
                f"{view.path} holds {len(crops):,} crops of another cache ({crops_id[:12]}; this one is "
                f"{self.cache.crops_id[:12]} with {self.cache.n_images:,}). Delete the folder and make the view again."
            )
        crops.require_same_decoder()
        return crops, []

    def _arrays(self) -> list[list[str]]:
        """The arrays that are read of each store."""
        return []

    def _kept(self) -> list[int]:
        """Of each store that is opened the patches of a row whose tokens are read, or 0 for all."""
        return []

    def _patches_of(self, first_step: int, micro_rows: np.ndarray, stores: list[StoreReader]) -> Callable | None:
        """JoinedLoader.batches' `patches_of` for micro-batches from step `first_step` on; None if all tokens are read."""
        return None

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        return ()

    def _mask(self, raw: RawBatch) -> Mask | None:
        return None

    def views_of(self, n_views: int) -> list[str]:
        """The sha256 of the crops of the first views. Raises NotInCacheError unless all of them are whole, with their targets."""
        return [view.crops_sha256 for view in complete_views(self.cache, self.store_names, n_views)]

    def change_views(self, changes: Sequence[tuple[int, list[str]]]) -> None:
        """Epoch e reads view e mod V, and V is another from some steps on: (completed steps, sha256 of the views).

        Raises NotInCacheError for views that are not whole, MismatchError for others than the run has had.
        """
        self.views = complete_views(self.cache, self.store_names, max(len(self.views), *(len(names) for _, names in changes)))
        there = [view.crops_sha256 for view in self.views]
        for step, names in changes:
            odd = [number for number, name in enumerate(names) if there[number] != name]
            if odd:
                raise MismatchError(
                    f"View {odd[0]} of {self.cache.path} holds other crops than the run has from step {step + 1:,} on. Put back "
                    "the views that it was trained on, or start a new run in another directory."
                )
        self._views_from = [(0, len(self.identity["views"])), *((step, len(names)) for step, names in changes)]

    def _view(self, step: int) -> View:
        """What the step behind `step` completed ones reads."""
        n_views = [n for first, n in self._views_from if first <= step][-1]
        return self.views[step // self.steps_per_epoch % n_views]

    def rows_of(self, step: int) -> tuple[int, list[int]]:
        """Number of the view, and the rows in order, that the step behind `step` completed ones takes."""
        ((_, rows),) = self.order.steps(step, step + 1)
        return self._view(step).number, rows[0].tolist()

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of steps [first_step, last_step): `accumulate` each, on the device. Epoch e reads view e mod V."""
        changing = {step for step, _ in self._views_from if first_step < step < last_step}
        for first, last in itertools.pairwise(sorted({first_step, last_step} | changing)):
            yield from self._batches(first, last)

    def _batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """`micro_batches` of steps that have the same number of views."""
        step = first_step
        for _, rows in self.order.steps(first_step, last_step):
            view = self._view(step)
            if view.number not in self._opened:  # once a run: readers remember which rows they have checked
                self._opened[view.number] = self._open(view)
            crops, stores = self._opened[view.number]
            places = rows.reshape(len(rows), self.accumulate * self.world, -1)
            own = places[:, [place_of(index, self.rank, self.world) for index in range(self.accumulate)]]
            micro_rows = own.reshape(-1, own.shape[2])
            if self._loader is None:
                self._loader = JoinedLoader(crops, stores, self._arrays(), micro_rows.shape[1], self._workers,
                                            kept=self._kept(), device=self.device)  # fmt: skip
            else:
                self._loader.open(crops, stores)
            for raw in self._loader.batches(micro_rows, self._patches_of(step, micro_rows, stores)):
                yield self._batch(raw)
            step += len(rows)

    def _batch(self, raw: RawBatch) -> Batch:
        """Rows and labels stay on the CPU: no loss reads them, and copying them would make the host wait."""
        rows = torch.from_numpy(raw.rows)
        return Batch(normalise(raw.images), rows, self._labels[rows], self._targets(raw), self._mask(raw))


class _Stored:
    """What a run reads of one teacher's stores: layers, their quantiser, the way from a record to targets."""

    def __init__(self, store: StoreReader, name: str, needs: Needs, cache: Cache, device: torch.device):
        self.name, self.needs, self.teacher, self.spec = name, needs, store.teacher, store.spec
        self.layers = block_numbers(needs, self.teacher)
        missing = [layer for layer in self.layers if layer not in self.spec.layers]
        if missing or needs.attention and not self.spec.attention:
            what = f"layers {', '.join(map(str, missing))}" if missing else "attention"
            wanted = ",".join(map(str, sorted({*self.layers, *self.spec.layers})))
            command = extract_command(cache.path, f"{name}-more", store.manifest)
            raise NotInCacheError(
                f"{store.path} lacks {what}; it holds layers {', '.join(map(str, self.spec.layers))} of {self.teacher.depth}"
                f"{' and attention' if self.spec.attention else ', no attention'}. Make a store that has them: {command} "
                f"--layers {wanted}; then train with --teacher {name}-more."
            )
        self.identity = {
            "store": name,
            "weights_sha256": self.teacher.weights_sha256,
            "probe_sha256": store.manifest.probe_sha256,
            "shared_sha256": hashlib.sha256(canonical_json(store.store.shared_sha256)).hexdigest(),  # quantiser, head and probe
            "dtype": self.spec.dtype,
        }
        self.head = teacher_head(store.head, device)
        statistics = [store.statistics[layer] for layer in self.layers] if self.spec.is_quantised else []
        stacked = lambda field: torch.from_numpy(np.stack([getattr(s, field) for s in statistics])).to(device)  # noqa: E731
        self._centre, self._spread = (stacked("centre"), stacked("spread")) if statistics else (None, None)  # [L, D]

    @property
    def arrays(self) -> list[str]:
        return self.spec.arrays_read(self.layers, self.needs.attention)

    def n_kept(self, masks: MasksAhead | None) -> int:
        """The patches whose tokens are read where the masks of the run are drawn before; 0 if those of all are, or none."""
        if masks is None or self.needs.hidden or not self.layers or self.spec.visible:
            return 0
        is_fewer = masks.masker.n_keep < self.teacher.n_patches == masks.n_patches
        return masks.masker.n_keep if is_fewer else 0

    def targets(self, record: Tensor, parts: list[Part], index: Tensor | None) -> Targets:
        """Targets from records uint8 [B, record bytes] on the device.

        parts: of this teacher's arrays. index: int64 [B, K], the patches whose tokens were read; None: those that are stored.
        """
        n_tokens = None if index is None else index.shape[1] + int(self.teacher.has_cls)
        bytes_of = {part.array: record[:, part.offset : part.offset + part.n_bytes] for part in parts}

        def view(array: str) -> Tensor:
            shape = self.spec.row_shape(array, self.teacher, n_tokens)
            return bytes_of[array].view(getattr(torch, self.spec.row_dtype(array))).unflatten(1, shape)

        attention = view("attention").clone() if self.needs.attention else None
        if self.spec.visible:
            index = view("index").long()
        shape = (len(record), len(self.layers), n_tokens or self.spec.n_tokens(self.teacher), self.teacher.dim)
        tokens = record.new_empty(shape, dtype=torch.float32)
        scale = view("scale") if self.layers and self.spec.is_quantised else None  # [B, layers of the store, T, G]
        for i, layer in enumerate(self.layers):
            stored = view(ARRAY_NAME.format(layer))
            if scale is None:
                tokens[:, i] = stored
            else:
                dequantise(stored, scale[:, self.spec.layers.index(layer)], self._centre[i], self._spread[i], self.spec.group,
                           out=tokens[:, i])  # fmt: skip
        return Targets(tokens, self.needs.layers, self.teacher.has_cls, attention, self.head, index)


class CachedSource(CropSource):
    """Crops joined with the targets that a student needs of each of its teachers, from as many stores of the cache.

    masks: of the run. Given them, and a teacher whose hidden patches no loss looks at, the source draws each batch's (Batch.mask)
    and copies, sends and dequantises of that teacher the tokens of visible patches alone. (A compressed row is decoded whole.)
    """

    def __init__(self, cache: Cache, store_names: Sequence[str], needs: Sequence[Needs], *, reader: str = "mmap",
                 check: str = "first", masks: MasksAhead | None = None, **options):  # fmt: skip
        self.reader, self.check = reader, check
        super().__init__(cache, store_names=store_names, **options)
        first = self.views[0]
        self.stored = [
            _Stored(StoreReader(first.store_path(name)), name, wanted, cache, self.device)
            for name, wanted in zip(store_names, needs, strict=True)
        ]
        self.identity["teachers"] = [stored.identity for stored in self.stored]
        self.masks = masks if any(stored.n_kept(masks) for stored in self.stored) else None

    def _open(self, view: View) -> tuple[CropReader, list[StoreReader]]:
        crops, _ = super()._open(view)
        return crops, [StoreReader(view.store_path(name), self.reader, self.check) for name in self.store_names]

    def _arrays(self) -> list[list[str]]:
        return [stored.arrays for stored in self.stored]

    def _kept(self) -> list[int]:
        return [stored.n_kept(self.masks) for stored in self.stored]

    def _patches_of(self, first_step: int, micro_rows: np.ndarray, stores: list[StoreReader]) -> Callable | None:
        if self.masks is None:
            return None

        def patches(index: int) -> np.ndarray:
            step, own = divmod(index, self.accumulate)
            attention = stores[0].read("attention", micro_rows[index]) if self.masks.masker.needs.attention else None
            place = place_of(own, self.rank, self.world)
            return self.masks.order(first_step + step, self.order.batch_size, place, self.world * self.accumulate, attention)

        return patches

    def _mask(self, raw: RawBatch) -> Mask | None:
        return None if raw.patches is None else self.masks.masker.mask(raw.patches)

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        """The record has travelled as it is stored; tokens become float on the device."""
        record = raw.records if raw.records is not None else raw.images.new_empty((len(raw.rows), 0))
        return tuple(
            stored.targets(record, [part for part in self._loader.parts if part.store == place],
                           raw.patches[:, :n_kept] if n_kept else None)
            for place, (stored, n_kept) in enumerate(zip(self.stored, self._kept(), strict=True))
        )  # fmt: skip


def dequantise(stored: Tensor, scale: Tensor, centre: Tensor, spread: Tensor, group: int, out: Tensor | None = None) -> Tensor:
    """format/quantize.py on the device: int8 [B, T, D] or, two to a byte, uint8 [B, T, ceil(D / 2)], and float16 [B, T, G] ->
    float32 [B, T, D], in `out` if it is given.

    As few passes over float32 values as can be: on a CPU or a GPU they take longer than the arithmetic.
    """
    dim = len(centre)
    if stored.dtype == torch.uint8:
        levels = torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., :dim].view(torch.int8) - 8
    else:
        levels = stored
    if dim % group == 0:
        standardised = (levels.unflatten(-1, (-1, group)) * scale.float().unsqueeze(-1)).flatten(-2)
    else:
        standardised = levels * scale.float().repeat_interleave(group, dim=-1)[..., :dim]
    return torch.addcmul(centre, standardised, spread, out=out)


class LiveSource(CropSource):
    """The same crops in the same order, their targets computed by the teachers on the spot.

    teachers: teacher_cache.teachers.base.Teacher, on the source's device; needs: of each of them.
    """

    def __init__(self, cache: Cache, teachers: Sequence, needs: Sequence[Needs], **options):
        super().__init__(cache, **options)
        self.teachers, self.needs = list(teachers), list(needs)
        for teacher in self.teachers:
            if teacher.device.type != self.device.type:
                raise UsageError(f"The teacher is on {teacher.device}, the student on {self.device}.")
        self.identity["teachers"] = [
            {"live": teacher.spec.name, "weights_sha256": teacher.spec.weights_sha256} for teacher in self.teachers
        ]
        self.heads = [teacher_head(teacher.head, self.device) for teacher in self.teachers]

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        return tuple(
            self._targets_of(teacher, needs, head, raw.images)
            for teacher, needs, head in zip(self.teachers, self.needs, self.heads, strict=True)
        )

    @staticmethod
    def _targets_of(teacher, needs: Needs, head: TeacherHead, images_u8: Tensor) -> Targets:
        layers = block_numbers(needs, teacher.spec)
        output = teacher(images_u8, layers or [teacher.spec.depth])
        attention = output.attention if needs.attention else None
        return Targets(output.tokens[:, : len(layers)], needs.layers, teacher.spec.has_cls, attention, head)
