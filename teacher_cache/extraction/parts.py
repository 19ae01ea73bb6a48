"""The work folder of an unfinished crop stage: crops in parts of at most 512 images, each committed as it is done.

    CACHE/crops.partial/     job.json                                  what is being made, from which images
        bad.txt              the images that cannot be used, and why
        view-000/            000007.bin  000007.npy  000007.json       one part: encoded crops, records, and the commit

A part of a view is finished when its .json is there, which is written last: it says which images cannot be used and why, and
vouches for the records, which vouch for the crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from ..cache import CropsIdentity, identity_differences
from ..errors import CacheCorruptError, MismatchError
from ..files.durable import (
    crc32c,
    inside,
    make_folder,
    npy_bytes,
    read_npy,
    read_sealed,
    remove,
    remove_folder,
    seal,
    sha256_file,
    write_whole,
)
from ..format import layout
from ..format.crop_record import CROP_DTYPE
from ..format.layout import WORK
from ..format.spec import MAX_ROWS

PART_ROWS = 512
"""Images of a part at most."""
PART_BYTES = 512 << 20
"""Of the crops of a part in all its views, if they were stored raw: they are in memory together. 384 px in two views: 512 images;
4096 px in one: 10."""


def is_left_over(cache_dir: Path) -> bool:
    """Whether a work folder is there although its stage is over: the process was killed when it had published the last view."""
    views = [view.name for view in (cache_dir / WORK).glob(layout.VIEWS)]
    is_published = all((cache_dir / view / layout.CHECKSUMS_JSON).exists() for view in views)
    return (cache_dir / WORK).exists() and (cache_dir / layout.CACHE_JSON).exists() and is_published


class WorkFolder:
    """What one crop stage has on disk before it publishes.

    names: its images in row order. views: those it makes. size: side of a crop, pixels. Nothing is read or written before a
    method asks for it.
    """

    def __init__(self, cache_dir: Path, names: tuple[str, ...], views: tuple[int, ...], size: int):
        self.cache_dir, self.path, self.names, self.views, self.size = cache_dir, cache_dir / WORK, names, views, size

    # --- parts ---

    @cached_property
    def part_rows(self) -> int:
        """Images of a part: as the stage that is there was begun, else as many as memory should hold."""
        if self._is_begun:
            begun = read_sealed(self.path / layout.JOB_JSON).get("part_rows")
            if type(begun) is not int or not 1 <= begun <= MAX_ROWS:
                raise CacheCorruptError(
                    f"{self.path / layout.JOB_JSON}: part_rows is {begun!r}. Delete {self.path} to start over."
                )
            return begun
        return max(1, min(PART_ROWS, PART_BYTES // (3 * self.size**2 * len(self.views))))

    @property
    def _is_begun(self) -> bool:
        return (self.path / layout.JOB_JSON).exists() and not is_left_over(self.cache_dir)

    @property
    def n_parts(self) -> int:
        return -(-len(self.names) // self.part_rows)

    def rows_of(self, part: int) -> slice:
        return slice(part * self.part_rows, (part + 1) * self.part_rows)

    def missing_views(self, part: int) -> list[int]:
        return [view for view in self.views if not self._commit(view, part).exists()]

    def finished_views(self, part: int) -> list[int]:
        return [view for view in self.views if self._commit(view, part).exists()]

    @property
    def n_missing_crops(self) -> int:
        """Crops, over all views, that no committed part holds yet."""
        return sum(len(self.names[self.rows_of(part)]) * len(self.missing_views(part)) for part in range(self.n_parts))

    def _file(self, view: int, part: int, suffix: str) -> Path:
        return layout.part_path(self.path, view, part, suffix)

    def _commit(self, view: int, part: int) -> Path:
        return self._file(view, part, ".json")

    # --- begin and end ---

    def require_begun_alike(self, identity: CropsIdentity) -> None:
        """Raise MismatchError, naming what differs, if the stage that was begun here was to make something else."""
        if not self._is_begun:
            return
        differing = identity_differences(read_sealed(self.path / layout.JOB_JSON), self._describe(identity), "begun")
        if differing:
            raise MismatchError(
                f"{self.path} was begun with other images or parameters:\n  " + "\n  ".join(differing) +
                "\nContinue with the same ones, or delete that folder to start the crop stage over."
            )  # fmt: skip

    def begin(self, identity: CropsIdentity) -> None:
        """Record what is being made, or check that a stage begun earlier makes the same."""
        self.__dict__.pop("part_rows", None)  # since it was looked at, another process may have begun the stage
        self.require_begun_alike(identity)
        if is_left_over(self.cache_dir):
            self.remove()
        for view in self.views:
            make_folder(inside(self.cache_dir, layout.view_path(Path(WORK), view).as_posix()))
        if not (self.path / layout.JOB_JSON).exists():
            write_whole(self.path / layout.JOB_JSON, seal(self._describe(identity)))

    def _describe(self, identity: CropsIdentity) -> dict:
        """What job.json says: parts on disk serve a later run only if it says the same."""
        return {**identity.to_json(), "part_rows": self.part_rows}

    def remove(self) -> None:
        remove_folder(self.path)

    # --- what is in the parts ---

    def commit(self, part: int, views: list[int], results: list[list[tuple[np.void, bytes]] | str]) -> None:
        """Write one part of these views.

        results: for each image of the part either (record, encoded crop) of every view, or why it cannot be used.
        """
        names = self.names[self.rows_of(part)]
        bad = {name: reason for name, reason in zip(names, results, strict=True) if isinstance(reason, str)}
        for index, view in enumerate(views):
            records, encoded = np.zeros(len(results), CROP_DTYPE), []
            for i, result in enumerate(results):
                if not isinstance(result, str):
                    records[i], crop = result[index]
                    encoded.append(crop)
            write_whole(self._file(view, part, ".bin"), b"".join(encoded))
            write_whole(self._file(view, part, ".npy"), npy_bytes(records))
            sha256 = sha256_file(self._file(view, part, ".npy"))
            write_whole(self._commit(view, part), seal({"bad": bad, "records_sha256": sha256}))

    def take_back(self, part: int, view: int) -> None:
        """Declare a part unfinished."""
        remove(self._commit(view, part))

    def bad_of(self, part: int, view: int) -> dict[str, str]:
        """Name -> `name: reason` of the images of a finished part that cannot be used."""
        return self._committed(part, view)["bad"]

    def _committed(self, part: int, view: int) -> dict:
        try:
            return read_sealed(self._commit(view, part))
        except CacheCorruptError as error:
            raise self._damaged(part, view, self._commit(view, part)) from error

    def _damaged(self, part: int, view: int, file: Path) -> CacheCorruptError:
        advice = f"Delete {self._commit(view, part)} and run the same command again: this part alone is made anew."
        return CacheCorruptError(f"{file} was damaged. {advice}")

    def bad(self) -> dict[str, str]:
        """The same of all images in any view, in row order, when all parts are finished."""
        bad = {}
        for part in range(self.n_parts):
            of_part = {}
            for view in self.views:
                of_part |= self.bad_of(part, view)
            bad |= {name: of_part[name] for name in self.names[self.rows_of(part)] if name in of_part}
        return bad

    def list_bad(self, bad: dict[str, str]) -> Path:
        """Write bad.txt, a line an image; returns its path."""
        write_whole(self.path / layout.BAD_TXT, "".join(f"{reason}\n" for reason in bad.values()).encode())
        return self.path / layout.BAD_TXT

    def records_of(self, part: int, view: int) -> np.ndarray:
        """CROP_DTYPE [images of the part]; zeros for one that cannot be used."""
        file = self._file(view, part, ".npy")
        if not file.exists() or sha256_file(file) != self._committed(part, view)["records_sha256"]:
            raise self._damaged(part, view, file)
        return read_npy(file, CROP_DTYPE)

    def records(self, view: int) -> np.ndarray:
        """CROP_DTYPE [images], when all parts are finished."""
        return np.concatenate([self.records_of(part, view) for part in range(self.n_parts)])

    def encoded(self, view: int, ok: np.ndarray) -> Iterator[bytes]:
        """The encoded crops of a view in row order, each checked against its record; rows that are not `ok` are left out."""
        for part in range(self.n_parts):
            records, file = self.records_of(part, view), self._file(view, part, ".bin")
            data, position = file.read_bytes() if file.exists() else b"", 0
            for keep, record in zip(ok[self.rows_of(part)], records, strict=True):
                encoded = data[position : position + int(record["bytes"])]
                position += len(encoded)
                if crc32c(encoded) != record["crc32c"] or len(encoded) != record["bytes"]:
                    raise self._damaged(part, view, file)
                if keep:
                    yield encoded
