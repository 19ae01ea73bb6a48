"""A store coded by a transform from another that is there, without the teacher: fitted to what that store says, and checked
against it. Interrupted, it goes on, shard by shard, as an extraction does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..cache import Cache, View
from ..device import device_name, pick_device
from ..encoding.encode import to_host
from ..encoding.fit import Fitted, Sample, fit, fit_bytes
from ..encoding.klt_encode import TransformEncoder
from ..errors import MismatchError, NotInCacheError, UsageError
from ..files.range_claims import claimed_range
from ..files.space import free_bytes, full_disk_explained, require_space
from ..format.dtypes import dtype_of, klt_bits
from ..format.layout import PROBE, store_claims, store_file_name
from ..format.spec import MadeWith, StoreSpec, array_names, new_version
from ..format.transform import layers_together
from ..store.manifest import create_store, extract_command
from ..store.reader import StoreReader
from ..store.store import Store, is_begun
from ..store.writer import missing_bytes
from ..terminal.progress import note, progress
from ..words import human
from .background import BackgroundWriter
from .filling import begin_once, complete, counted, cut, is_done, loss_explained
from .planning import cleaned_name
from .record import software

BATCH = 64
"""Rows that are read, coded and written at a time: what the codes of a row are may depend on it in the last step."""


def recode(cache: Cache, source: str, dtype: str, name: str, device: str = "auto") -> bool:
    """Make the store `name` of dtype klt:BITS in every view that has the store `source`; returns whether anything was to do.

    source: complete in each of them, of another dtype. Raises UsageError for what cannot be recoded, NotInCacheError where there
    is no such store or it is not complete, MismatchError if a store of that name was made otherwise.
    """
    dtype, name, source, device = dtype_of(dtype), cleaned_name(name), store_file_name(source), pick_device(device, "auto")[0]
    if name == source:
        raise UsageError(f"--name {name}: that is the store itself. Give the new one another name.")
    views = [view for view in cache.views() if source in view.store_names()]
    if not views or views[0].number != 0:
        raise NotInCacheError(f"View 0 of {cache.path} has no store {source}; it has {_names(cache)}.")
    jobs = [_Job(view, source, dtype, name, torch.device(device)) for view in views]
    for job in jobs:
        if is_begun(job.path):
            job.require_same(Store.open(job.path))
    needed = sum(missing_bytes(job.path, job.spec, job.reader.teacher) for job in jobs)
    needed = needed if is_begun(jobs[0].path) else max(needed, fit_bytes(jobs[0].spec, jobs[0].reader.teacher))
    note(f"targets  {len(jobs)} view{'s' * (len(jobs) > 1)} of {source} as {dtype}: {human(needed)} to write, "
         f"{human(free_bytes(cache.path))} free")  # fmt: skip
    require_space(cache.path, needed)
    return any([job.run() for job in jobs])  # all of them


def _names(cache: Cache) -> str:
    views = cache.views()
    return ", ".join(views[0].store_names()) if views and views[0].store_names() else "none"


class _Job:
    """One view: the store that is read, and the one that is made."""

    def __init__(self, view: View, source: str, dtype: str, name: str, device: torch.device):
        self.view, self.name, self.device = view, name, device
        self.reader = StoreReader(view.store_path(source), check="always")
        view.require_own(self.reader.manifest)
        self.path = view.store_path(name)
        manifest, spec = self.reader.manifest, self.reader.spec
        if not self.reader.is_complete:
            command = extract_command(view.cache.path, source, manifest)
            raise NotInCacheError(f"{self.reader.path} is not complete. Finish it: {command}")
        if spec.is_transformed:
            raise UsageError(f"{self.reader.path} is {spec.dtype} already: recode an int8 or float16 store.")
        if klt_bits(dtype) is None:
            raise UsageError(f"--dtype {dtype}: recode makes klt:BITS. For another dtype, extract again.")
        if manifest.format_version < 3:
            raise UsageError(
                f"{self.reader.path} is of version {manifest.format_version}, which does not say enough of its teacher for a "
                "store of version 5. Extract again."
            )
        names = array_names(spec.layers, dtype, spec.attention, spec.visible)
        self.spec: StoreSpec = replace(
            spec, dtype=dtype, group=layers_together(self.reader.teacher.dim), codecs=tuple((array, "none") for array in names),
        )  # fmt: skip
        self.source = {"name": source, "dtype": spec.dtype, "sha256": self.reader.store.sha256}

    def require_same(self, found: Store) -> None:
        """Raise MismatchError if a store that is there was made otherwise."""
        manifest = found.manifest
        if (manifest.store.dtype, manifest.source) != (self.spec.dtype, self.source):
            made_from = f"the store {manifest.source['name']}" if manifest.source else "the teacher"
            raise MismatchError(
                f"{self.path} was made otherwise: {manifest.store.dtype} from {made_from}; asked for is {self.spec.dtype} from "
                f"the store {self.source['name']} as it is now. Give another --name, or remove that store."
            )

    def run(self) -> bool:
        """Make what is missing; returns whether anything was."""
        if is_done(self.path):
            return False
        with full_disk_explained(self.path, lambda: "Finished shards are kept. Make room and run the same command again."):
            begin_once(self.path, self._begin, self.require_same, None)
            with (
                loss_explained(self.path),
                claimed_range(store_claims(self.path), 0, self.spec.n_shards, f"The store {self.path}") as claim,
            ):
                store = Store.open(self.path)
                if missing := store.missing_shards():
                    self._fill(store, missing, claim.report)
                return complete(store, None) or bool(missing)

    def _begin(self) -> None:
        reader, first = self.reader, self.view.cache.view(0).store_path(self.name)
        if self.view.number:
            begun = Store.open(first)
            fitted = Fitted(begun.statistics(), begun.manifest.fidelity, begun.transform())
        else:
            fitted = self._fit()
        made = MadeWith(BATCH, False, device_name(self.device))
        manifest = replace(
            reader.manifest, store=self.spec, fidelity=fitted.fidelity, software=software(), made=made, source=self.source,
            format_version=new_version(self.spec),
        )  # fmt: skip
        create_store(self.path, manifest, fitted.statistics, reader.head, reader.store.small_array(PROBE), fitted.transform)

    def _fit(self) -> Fitted:
        with Sample(self.view.path, self.spec, self.reader.teacher) as sample:
            n_rows = sample.size.all_rows
            with progress("fitting the transform", n_rows, "crops") as advance:
                for rows in cut(range(n_rows), BATCH):
                    drawn = sample.draw(len(rows))[:, None, :, None]
                    sample.add(np.take_along_axis(self._tokens(rows), drawn, axis=2))
                    advance(len(rows))
            return fit(sample, self.spec)

    def _tokens(self, rows: np.ndarray) -> np.ndarray:
        """float32 [B, L, T, D], as the source has them."""
        return np.stack([self.reader.tokens(rows, layer) for layer in self.spec.layers], 1)

    def _fill(self, store: Store, shards: list[int], report: Callable[[float], None]) -> None:
        encode = TransformEncoder(store.spec, store.transform(), store.statistics(), self.device)
        in_fp32, copied = self.reader.store.read_fp32_rows(), [a for a in ("attention", "index") if a in store.spec.array_names]
        n_rows, n_missing = store.spec.n_rows, sum(len(store.spec.rows_of(shard)) for shard in shards)
        what = f"view {self.view.number}: {self.name}"
        with (
            progress(what, n_rows, "crops", n_rows - n_missing) as advance,
            BackgroundWriter(store, counted(advance, report)) as out,
        ):
            for shard in shards:
                of_shard = store.spec.rows_of(shard)
                for rows in cut(of_shard, BATCH):
                    arrays = to_host(encode(torch.from_numpy(self._tokens(rows)).to(self.device)))()
                    arrays |= {array: self.reader.read(array, rows) for array in copied}
                    out.put(shard, arrays, rows[-1] == of_shard[-1], in_fp32[np.isin(in_fp32, rows)])


def tell(path: Path) -> list[str]:
    """What a recoded store is off from its source by, a line a layer."""
    return [
        f"layer {layer.layer}: {layer.median:.2%} off the source at the median, {layer.p99:.2%} at p99, {layer.worst:.2%} worst"
        for layer in Store.open(path).manifest.fidelity
    ]
