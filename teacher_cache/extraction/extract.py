"""Extraction: the crops of each view, the frozen teacher, a store. Run once; interrupted, run again.

A shard is the unit of work: decode its crops, run the teacher, quantise, append, commit. Batches restart at each shard, so the
same inputs give the same bytes, interrupted or not, by one process or by several that share the shards out. The quantiser is
fitted once, on view 0, by one process, before any shard. While the teacher works on one batch, the next are decoded, and those
before quantised on its device, copied to the host and written.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from ..cache import View
from ..crops.beton import CropReader
from ..encoding.encode import Encoder, race, take_tokens, token_places
from ..encoding.fit import Fitted, Sample, fit
from ..errors import BadInputError, NotInCacheError
from ..files.range_claims import claimed_range
from ..files.space import full_disk_explained
from ..format.layout import PROBE, store_claims
from ..format.spec import StoreSpec, comparable, new_version
from ..store import writer
from ..store.manifest import Manifest, create_store
from ..store.nonfinite import NO_ROWS, finite_output, require_few, rerun
from ..store.store import Store, is_begun
from ..terminal.progress import Progress, note, progress, waiting
from ..words import human
from .background import BackgroundWriter
from .filling import begin_once, complete, counted, cut, is_done, loss_explained
from .planning import ExtractPlan, in_words_of, own_shards, require_like, spec_differences, target_differences
from .probe import probe_output, require_same_probe
from .record import changes, made_with, software

DECODE_AHEAD = 2
"""Batches that are decoded while the teacher works on another."""
SLOW_SHARE, SLOW_S = 0.1, 60.0
"""A share of the time, and a time, from which one says what the teacher had to wait for."""


@dataclass(frozen=True)
class _Job:
    """What is asked for: the store `name` of a view, filled by a teacher as a plan says."""

    view: View
    name: str
    teacher: object
    plan: ExtractPlan
    path: Path
    spec: StoreSpec
    """What the plan makes of this teacher and view."""

    @classmethod
    def of(cls, view: View, name: str, teacher, plan: ExtractPlan) -> _Job:
        described = in_words_of(view.cache.path, name, teacher.spec)
        return cls(view, name, teacher, plan, view.store_path(name), plan.store_spec(described, view.cache.n_images))

    def require_same(self, store: Store, view: View) -> None:
        """Raise MismatchError naming every way in which a store of `view` is not the one asked for."""
        found = store.manifest
        spec = self.teacher.spec.in_version(found.format_version)
        mine, theirs = comparable(replace(spec, weights=found.teacher.weights).to_json(), found.teacher.to_json())
        mine |= {"precision": self.teacher.precision, "crops_id": view.cache.crops_id, "crops_sha256": view.crops_sha256}
        theirs |= {"precision": found.precision, "crops_id": found.crops_id, "crops_sha256": found.crops_sha256}
        if mine["weights_sha256"] != theirs["weights_sha256"]:  # a seed or a file's name says more than the sum alone
            for values, of in ((mine, spec), (theirs, found.teacher)):
                values["weights"] = f"{of.weights} (sha256 {values.pop('weights_sha256')[:12]})"
        require_like(store.path, spec_differences(theirs, mine) + target_differences(found, self.plan, self.spec))


def extract_view(view: View, name: str, teacher, plan: ExtractPlan, shards: range | None = None) -> bool:
    """Finish the store `name` of one view, or those of its shards that are in `shards`; returns False if there was nothing to do.

    teacher: a teachers.base.Teacher. View 0 has to be begun before any other, because they share its quantiser.
    shards: several processes may work on one store if each is given its own range. One of them begins it, the others wait for
    that; the one that makes the last shard completes it.
    Raises MismatchError if a store of that name was made with anything else than what is given now, or if another process works
    on the same shards; UsageError if `shards` begins behind the last shard.
    """
    filling = Filling(view, name, teacher, plan, None if shards is None else waiting(f"view {view.number}: {name}"))
    path, own = filling.path, own_shards(shards, filling.spec)
    if filling.is_done:
        return False
    filling.begin()
    with filling.losses_explained(own), claimed_range(store_claims(path), own.start, own.stop, f"The store {path}") as claim:
        store = filling.store
        missing = [shard for shard in store.missing_shards() if shard in own]
        n_rows, n_missing = (sum(len(store.spec.rows_of(shard)) for shard in which) for which in (own, missing))
        with progress(f"view {view.number}: {name}", n_rows, "crops", n_rows - n_missing) as advance:
            if missing:
                filling.make(missing, advance, claim.report)
        return filling.complete() or bool(missing)


class Filling:
    """The store `name` of one view, as this process fills it: begin it, make shards that one has claimed, complete it.

    wait: told whom one waits for while another process begins or completes the store; None: that is an error. path, spec: where
    the store is or will be, and what it is. Raises MismatchError if it was made with anything else than what is given now.
    """

    def __init__(self, view: View, name: str, teacher, plan: ExtractPlan, wait: Callable | None):
        self._job, self._wait, self._is_checked = _Job.of(view, name, teacher, plan), wait, False
        self.path, self.spec = self._job.path, self._job.spec
        if is_begun(self.path):
            self._job.require_same(Store.open(self.path), view)

    @property
    def is_done(self) -> bool:
        """Whether the store is complete, and no claims of the dead are left to be cleared away."""
        return is_done(self.path)

    @contextmanager
    def losses_explained(self, own: range) -> Iterator[None]:
        """Say of a disk that is full, or a store that goes away meanwhile, what that means. own: the shards of this process."""
        with full_disk_explained(self.path, lambda: _kept(self._job, own)), loss_explained(self.path):
            yield

    def begin(self) -> None:
        """Begin the store unless it was begun, perhaps by another process that is at it."""
        with full_disk_explained(self.path, lambda: _kept(self._job, range(self.spec.n_shards))):
            job, crops = self._job, self._crops
            same = partial(job.require_same, view=job.view)
            self._is_checked = begin_once(job.path, partial(_begin, job, crops), same, self._wait)

    @cached_property
    def _crops(self) -> CropReader:
        crops = CropReader(self._job.view.path)
        crops.require_same_decoder()
        return crops

    @cached_property
    def store(self) -> Store:
        """It has to be begun."""
        return Store.open(self.path)

    def make(self, shards: list[int], advance: Progress, report: Callable[[float], None]) -> None:
        """Make these shards, which nobody else makes meanwhile. report: told again and again how many crops a second."""
        view, teacher, plan = self._job.view, self._job.teacher, self._job.plan
        if not self._is_checked:
            require_same_probe(self.store, teacher)
            _note_changes(self.store, teacher, plan)
            self._is_checked = True
        _extract_shards(view, self.store, shards, self._crops, teacher, plan.batch_size, advance, counted(advance, report))

    def complete(self) -> bool:
        """Declare the store complete if no shard is missing; returns whether it was not before and is now."""
        return complete(self.store, self._wait)


def _note_changes(store: Store, teacher, plan: ExtractPlan) -> None:
    """Say with what a store is continued, or another view of it begun, that is not what it was begun with."""
    then, now = (store.manifest.software, store.manifest.made), (software(), made_with(teacher, plan.batch_size))
    if differing := changes(then, now):
        note(f"{store.path} was begun with other software or another machine; bytes may differ:")
        for line in differing:
            note(f"  {line}")


def require_same_targets(view: View, name: str, teacher, plan: ExtractPlan) -> None:
    """Raise MismatchError naming every way in which the store `name` of a view, if it was begun, is not the one asked for."""
    path = view.store_path(name)
    if is_begun(path):
        _Job.of(view, name, teacher, plan).require_same(Store.open(path), view)


def _decoded(crops: CropReader, batches: list[np.ndarray], device: torch.device) -> Iterator[torch.Tensor]:
    """The crops of each batch, uint8 [B, size, size, 3] on the host, from where `device` can fetch them while it works.

    DECODE_AHEAD batches are decoded in a thread while the caller works.
    """

    def decode(rows: np.ndarray) -> torch.Tensor:
        images = torch.from_numpy(crops.read(rows))
        return images.pin_memory() if device.type == "cuda" else images

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as ahead:
        pending = deque(ahead.submit(decode, rows) for rows in batches[:DECODE_AHEAD])
        try:
            for following in [*batches[DECODE_AHEAD:], *[None] * DECODE_AHEAD][: len(batches)]:
                images = pending.popleft().result()
                if following is not None:
                    pending.append(ahead.submit(decode, following))
                yield images
        finally:
            for task in pending:
                task.cancel()


def run_teacher(teacher, images, rows: np.ndarray, layers: tuple[int, ...], name_of: Callable[[int], str],
                forced: np.ndarray = NO_ROWS, index: np.ndarray | None = None
                ) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """tokens float32 [B, L, C+N, D] and attention float32 [B, N] | None, all finite: see nonfinite.finite_output.

    index: int32 [B, K], to have of the tokens CLS and these patches alone: [B, L, C+K, D].
    """
    images = torch.as_tensor(images, device=teacher.device)
    output, _ = finite_output(teacher, images, rows, layers, name_of, forced)
    tokens = output.tokens
    if index is not None:
        tokens = take_tokens(tokens, token_places(torch.as_tensor(index, device=tokens.device), int(teacher.spec.has_cls)))
    return tokens.cpu().numpy(), None if output.attention is None else output.attention.cpu().numpy()


def _extract_shards(view: View, store: Store, shards: list[int], crops: CropReader, teacher, batch_size: int, advance: Progress,
                    count: Callable[[int], None]) -> None:  # fmt: skip
    """Decode, run the teacher, encode, write: each for another batch at a time. `shards` are committed in their order.

    count: called with the number of rows behind each batch that was written.
    """
    begun = _Begun(view, store, teacher)
    batches = [(shard, rows) for shard in shards for rows in cut(store.spec.rows_of(shard), batch_size)]
    begin = time.monotonic()
    with BackgroundWriter(store, count) as out:
        decoded = _decoded(crops, [rows for _, rows in batches], teacher.device)
        before: Callable[[], None] | None = None  # hands the batch before to the writer when it is encoded
        for shard, rows in batches:
            try:
                with advance.waits_for("decode"):
                    images = next(decoded)
                with advance.waits_for("teacher"):
                    encoded = begun.encoding(images, rows)
            finally:  # what is encoded is kept, also if this batch fails
                if before is not None:
                    before()
            before = partial(_hand_over, out, shard, encoded, rows[-1] == store.spec.rows_of(shard)[-1], advance)
        before()
    if begun.n_fp32:
        note(
            f"view {view.number}: {store.path.stem}: {begun.n_fp32:,} crops made in fp32, as bf16 gave non-finite values for "
            "them."
        )
    waited = {"the crops": advance.waited.get("decode", 0.0), "the disk": out.waited_s}
    _note_waiting(f"view {view.number}: {store.path.stem}", waited, time.monotonic() - begin)


class _Begun:
    """A store being filled: batches through the teacher and its encoder, such that what comes out is finite.

    n_fp32: rows so far that had to be made in fp32 for that.
    """

    def __init__(self, view: View, store: Store, teacher):
        self.view, self.store, self.teacher = view, store, teacher
        self.encode = Encoder(store.spec, store.statistics(), store.manifest.view, teacher.device, store.transform())
        self.forced = store.read_fp32_rows_to_make() if store.has_fp32_rows else NO_ROWS
        self.n_fp32 = 0
        self._of_shard = (-1, 0)

    def encoding(self, images: torch.Tensor, rows: np.ndarray) -> Callable[[], tuple[dict[str, np.ndarray], np.ndarray]]:
        """Begin to encode a batch; the function returned waits for its row arrays, and the rows among it made in fp32."""
        images = images.to(self.teacher.device, non_blocking=True)
        wait = self.encode(self.teacher(images, self.store.spec.layers), rows)

        def finished() -> tuple[dict[str, np.ndarray], np.ndarray]:
            arrays, fp32_rows = wait(), NO_ROWS
            if not arrays["finite"].all() or np.isin(rows, self.forced).any():
                arrays, fp32_rows = self._rerun(images, rows)
            del arrays["finite"]
            return arrays, fp32_rows

        return finished

    def _rerun(self, images: torch.Tensor, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        spec, name = self.store.spec, self.teacher.spec.name
        output, fp32_rows = rerun(self.teacher, images, rows, spec.layers, _names(self.view), self.forced)
        other = f"Give --precision fp32 and another --name, and delete {self.store.path}."
        if len(fp32_rows) and not self.store.has_fp32_rows:
            raise BadInputError(
                f"{name} gives non-finite values in bf16 for row {fp32_rows[0]}, {_names(self.view)(fp32_rows[0])}. fp32 gives "
                f"numbers, but {self.store.path} is of version {self.store.manifest.format_version}, which cannot say that a row "
                "was made so. Give another --name: a new store can."
            )
        shard = int(rows[0]) // spec.shard_rows
        n_before = self._of_shard[1] if self._of_shard[0] == shard else 0
        self._of_shard = (shard, n_before + len(fp32_rows))
        require_few(self._of_shard[1], len(spec.rows_of(shard)), f"shard {shard} of {self.store.path}", name, other)
        self.n_fp32 += len(fp32_rows)
        return self.encode(output, rows)(), fp32_rows


def _names(view: View) -> Callable[[int], str]:
    """The image of a row; the list is read when somebody asks."""
    return lambda row: view.cache.images().names[row]


def _hand_over(out: BackgroundWriter, shard: int, encoded: Callable, is_last: bool, advance) -> None:
    with advance.waits_for("teacher"):
        arrays, fp32_rows = encoded()
    with advance.waits_for("disk"):
        out.put(shard, arrays, is_last, fp32_rows)


def _note_waiting(what: str, waited: dict[str, float], seconds: float) -> None:
    """Say what the teacher had to wait for, if it was for long."""
    for whom, waited_s in waited.items():
        if seconds > SLOW_S and waited_s > SLOW_SHARE * seconds:
            note(f"{what}: {whom} could not keep up with the teacher, which waited {waited_s / seconds:.0%} of the time for it.")


def _kept(job: _Job, own: range) -> str:
    """What a full disk leaves of a store, and what its own shards still need."""
    needed = f"{human(writer.missing_bytes(job.path, job.spec, job.teacher.spec, own))} are still to be written"
    kept = ""
    if is_begun(job.path):
        kept = f"{Store.open(job.path).n_finished()} of {job.spec.n_shards} shards are finished and kept; "
    return f"{kept}{needed}. Make room and run the same command again."


def _begin(job: _Job, crops: CropReader) -> None:
    """Create the store with the quantiser of a view that has it; else, on view 0, with a freshly fitted one."""
    view, teacher, plan, spec = job.view, job.teacher, job.plan, job.spec
    having = [other for other in view.cache.views() if is_begun(other.store_path(job.name))]
    described, version = teacher.spec, new_version(spec)
    if having:
        original = having[0].store(job.name)
        job.require_same(original, having[0])
        spec, version = original.spec, original.manifest.format_version
        described = replace(original.teacher, weights=teacher.spec.weights)  # in the words of its version
        _note_changes(original, teacher, plan)
        fitted = Fitted(original.statistics(), original.manifest.fidelity, original.transform())
        head, probe = original.head(), original.small_array(PROBE)
    elif view.number == 0:
        _require_finite_head(teacher)
        fitted = _fit(view, teacher, crops, spec, plan)
        head, probe = teacher.head, probe_output(teacher, spec.layers)
    else:
        raise NotInCacheError(
            f"View {view.number} shares the quantiser of view 0, which has no store {job.name}: extract view 0 first."
        )
    manifest = Manifest(
        teacher=described, store=spec, view=view.number, crops_id=view.cache.crops_id, crops_sha256=view.crops_sha256,
        precision=teacher.precision, fidelity=fitted.fidelity, probe_sha256=hashlib.sha256(probe.tobytes()).hexdigest(),
        software=software(), made=made_with(teacher, plan.batch_size) if version >= 3 else None, format_version=version,
    )  # fmt: skip
    create_store(job.path, manifest, fitted.statistics, head, probe, fitted.transform)


def _require_finite_head(teacher) -> None:
    """Raise BadInputError for a final norm or projection that no store can keep."""
    for name, values in teacher.head.items():
        if not np.isfinite(values).all():
            raise BadInputError(
                f"{teacher.spec.name}: {name} of its final norm holds non-finite values: the weights {teacher.spec.weights} are "
                "damaged. Give others."
            )


def _fit(view: View, teacher, crops: CropReader, spec: StoreSpec, plan: ExtractPlan) -> Fitted:
    """Run the teacher over the first rows of view 0, and fit the quantiser to what it says.

    Rows are in random order (images.py), so the first ones are a fair sample. Only what is sampled leaves the teacher's device.
    """
    n_fp32 = 0
    with Sample(view.path, spec, teacher.spec) as sample:
        n_rows = sample.size.all_rows
        with progress("fitting the quantiser", n_rows, "crops") as advance:
            batches = cut(range(n_rows), plan.batch_size)
            for rows, images in zip(batches, _decoded(crops, batches, teacher.device), strict=True):
                output, fp32_rows = finite_output(teacher, images.to(teacher.device), rows, spec.layers, _names(view))
                n_fp32 += len(fp32_rows)
                require_few(n_fp32, n_rows, "the quantiser's sample", teacher.spec.name, "Give --precision fp32.")
                kept = _kept_places(output, rows, spec)  # [B, T]
                drawn = kept.take_along_dim(torch.from_numpy(sample.draw(len(rows))).to(kept.device), 1)
                sample.add(take_tokens(output.tokens, drawn).cpu().numpy())
                advance(len(rows))
        return fit(sample, spec)


def _kept_places(output, rows: np.ndarray, spec: StoreSpec) -> torch.Tensor:
    """int64 [B, T] on the device: which of the C+N tokens of these rows of view 0 a store keeps, in its order."""
    n_tokens = output.tokens.shape[2]
    if not spec.visible:
        return torch.arange(n_tokens, device=output.tokens.device).expand(len(rows), -1)
    return token_places(race(output.attention, rows, 0, spec.visible), n_tokens - output.attention.shape[1])
