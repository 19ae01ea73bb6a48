"""Batches of crops with their targets from a cache. No teacher is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from student.batch import Mask, Needs, Targets
from student.devices.micro_batches import number_in_step
from student.masking import MasksAhead
from teacher_cache.cache import Cache, View
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import NotInCacheError
from teacher_cache.files.durable import canonical_json
from teacher_cache.store.manifest import extract_command
from teacher_cache.store.reader import StoreReader

from .crop_source import CropSource
from .dequantise import PlainDecoder, TransformDecoder
from .loader import RawBatch
from .record import Field
from .teacher_values import block_numbers, teacher_head

# B batch, N patches, K patches whose tokens are read, D width, L layers, T tokens of a row, G groups of channels


class StoredTargets:
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
        if self.spec.is_transformed:
            self._decode = TransformDecoder(self.spec, store.transform, self.layers, device)
        else:
            self._decode = PlainDecoder(self.spec, store.statistics, self.layers, device)

    @property
    def arrays(self) -> list[str]:
        return self.spec.arrays_read(self.layers, self.needs.attention)

    def n_kept(self, masks: MasksAhead | None) -> int:
        """The patches whose tokens are read where the masks of the run are drawn before; 0 if those of all are, or none."""
        if masks is None or self.needs.hidden_tokens or not self.layers or self.spec.visible:
            return 0
        is_fewer = masks.masker.n_keep < self.teacher.n_patches == masks.n_patches
        return masks.masker.n_keep if is_fewer else 0

    def targets(self, record: Tensor, fields: list[Field], index: Tensor | None) -> Targets:
        """Targets from records uint8 [B, record bytes] on the device.

        fields: of this teacher's arrays. index: int64 [B, K], the patches whose tokens were read; None: those that are stored.
        """
        n_tokens = None if index is None else index.shape[1] + int(self.teacher.has_cls)
        bytes_of = {field.array: record[:, field.offset : field.offset + field.n_bytes] for field in fields}

        def view(array: str) -> Tensor:
            shape = self.spec.row_shape(array, self.teacher, n_tokens)
            return bytes_of[array].view(getattr(torch, self.spec.row_dtype(array))).unflatten(1, shape)

        attention = view("attention").clone() if self.needs.attention else None
        if self.spec.visible:
            index = view("index").long()
        shape = (n_tokens or self.spec.n_tokens(self.teacher), self.teacher.dim)
        if self.spec.is_transformed:  # a layer is one product, and lies in one piece
            tokens = record.new_empty((len(self.layers), len(record), *shape), dtype=torch.float32)
        else:
            tokens = record.new_empty((len(record), len(self.layers), *shape), dtype=torch.float32).transpose(0, 1)
        self._decode(view, tokens)
        return Targets(tokens.transpose(0, 1), self.needs.layers, self.teacher.has_cls, attention, self.head, index)


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
            StoredTargets(StoreReader(first.store_path(name)), name, wanted, cache, self.device)
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
            number = number_in_step(own, self.rank, self.world)
            return self.masks.order(first_step + step, self.order.batch_size, number, self.world * self.accumulate, attention)

        return patches

    def _mask(self, raw: RawBatch) -> Mask | None:
        return None if raw.patches is None else self.masks.masker.mask(raw.patches)

    def _targets(self, raw: RawBatch) -> tuple[Targets, ...]:
        """The record has travelled as it is stored; tokens become float on the device."""
        record = raw.records if raw.records is not None else raw.images.new_empty((len(raw.rows), 0))
        return tuple(
            stored.targets(record, [field for field in self._loader.fields if field.store == number],
                           raw.patches[:, :n_kept] if n_kept else None)
            for number, (stored, n_kept) in enumerate(zip(self.stored, self._kept(), strict=True))
        )  # fmt: skip
