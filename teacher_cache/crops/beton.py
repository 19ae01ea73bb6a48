"""crops.beton: the baked crops of a view with their labels, in FFCV's file format, written in row order.

FFCV's own writer is not used: on equal data it gives files that differ from run to run, cannot resume, encodes JPEGs a second
time and hangs when a worker fails (docs/design/0002). Any FFCV loader can read what is written here; `CropReader` and the
student's loader decode it with FFCV's own C decoder, so that teacher and student see the same pixels bit for bit.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import CacheCorruptError, MismatchError, NotAllowedError, NotInCacheError
from ..files.durable import crc32c, create_aside, is_sha256, listed_files, open_plain, publish, read_npy, read_sealed, sha256_file
from ..format import layout
from ..format.crop_plan import CROP_FORMATS, LARGEST_SIZE
from ..format.crop_record import CROP_DTYPE
from ..kernels import sigbus
from ..kernels.codes import check_crops
from ..words import quoted

MIN_PAGE, MAX_PAGE = 4 << 10, 8 << 20  # bytes

# FFCV 1.0.2 file format, version 2 (ffcv/types.py), little-endian
_HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"),
                    ("alloc_table_ptr", "<u8")], align=True)  # fmt: skip
_FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
_RGB_IMAGE, _INT = 2, 1  # type ids
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_JPEG, _RAW = 0, 1  # modes


def _field(type_id: int, name: str) -> np.ndarray:
    record = np.zeros(1, _FIELD)
    record["type_id"] = type_id
    record["name"][0, : len(name)] = np.frombuffer(name.encode(), "u1")
    return record


def _page_bytes(largest: int) -> int:
    """FFCV's page: no crop crosses one, so that its process cache can read page by page. Room for 16 of the largest."""
    wanted = 1 << (16 * largest - 1).bit_length()
    return max(MIN_PAGE, min(MAX_PAGE, wanted), 1 << (largest - 1).bit_length())


def place_crops(sizes: np.ndarray) -> tuple[int, np.ndarray, int]:
    """Where everything lies: page size, pointers (uint64 [n_rows]), offset of the allocation table.

    sizes: uint64 [n_rows], bytes of the encoded crops.
    """
    head_bytes = _HEADER.itemsize + 2 * _FIELD.itemsize + len(sizes) * _SAMPLE.itemsize
    pointers = np.empty(len(sizes), "uint64")
    page = _page_bytes(int(sizes.max()))
    end = -(-head_bytes // page) * page
    for row, n_bytes in enumerate(sizes.tolist()):
        if end % page + n_bytes > page:
            end += page - end % page
        pointers[row] = end
        end += n_bytes
    return page, pointers, -(-end // 8) * 8


def write_beton(path: Path, crops: np.ndarray, labels: np.ndarray, size: int, crop_format: str, data: Iterable[bytes]):
    """Write `crops.beton` from the encoded crops in row order: aside, fsynced, renamed.

    crops: CROP_DTYPE [n_rows], for the sizes in bytes. labels: int64 [n_rows]. data: one bytes object a row.
    The same input gives the same bytes.
    """
    n_rows, sizes = len(crops), crops["bytes"].astype("uint64")
    page, pointers, table_start = place_crops(sizes)

    header = np.zeros(1, _HEADER)
    header["version"], header["num_fields"], header["page_size"] = 2, 2, page
    header["num_samples"], header["alloc_table_ptr"] = n_rows, table_start
    samples = np.zeros(n_rows, _SAMPLE)
    samples["image"]["mode"] = _RAW if CROP_FORMATS[crop_format] is None else _JPEG
    samples["image"]["width"] = samples["image"]["height"] = size
    samples["image"]["data_ptr"] = pointers
    samples["label"] = labels
    allocations = np.zeros(n_rows, _ALLOCATION)
    allocations["sample_id"], allocations["ptr"], allocations["size"] = np.arange(n_rows), pointers, sizes

    with create_aside(path, buffering=1 << 20) as file:
        for part in (header, _field(_RGB_IMAGE, "image"), _field(_INT, "label"), samples):
            file.write(part.tobytes())
        n_written = 0
        for row, encoded in enumerate(data):
            if len(encoded) != sizes[row]:
                raise CacheCorruptError(f"{path}: row {row} has {len(encoded)} bytes, its record says {sizes[row]}.")
            file.write(bytes(int(pointers[row]) - file.tell()))
            file.write(encoded)
            n_written += 1
        if n_written != n_rows:
            raise CacheCorruptError(f"{path}: {n_written} crops given for {n_rows} records.")
        file.write(bytes(table_start - file.tell()))
        file.write(allocations.tobytes())
        file.flush()
        os.fsync(file.fileno())
    publish(Path(file.name), path)


DECODER_CHECKS = 64
"""Crops of a view whose decoded pixels are on record."""
DECODED_BYTES = 64 << 20
"""Of pixels that `CropReader.each` keeps in memory: 445 crops of 224 px, one of 4096."""


def read_checksums(view_dir: Path) -> dict:
    """checksums.json of a view: `crops_id`, `files`, `crops.beton` and `decoded` (missing while a view is being made).

    Raises FileNotFoundError if there is none, CacheCorruptError if it is not what the format asks for.
    """
    path = Path(view_dir) / layout.CHECKSUMS_JSON
    value = read_sealed(path)
    beton, decoded = value.get(layout.CROPS_BETON), value.get("decoded", {"rows": [], "crc32c": []})
    if (
        list(listed_files(value, path)) != [layout.CROPS_NPY]
        or not is_sha256(value.get("crops_id"))
        or not isinstance(beton, dict)
        or type(beton.get("bytes")) is not int
        or not is_sha256(beton.get("tables_sha256"))
        or not isinstance(decoded, dict)
        or not all(isinstance(decoded.get(key), list) for key in ("rows", "crc32c"))
    ):
        raise CacheCorruptError(f"{path}: it does not say of crops.npy and crops.beton what it should.")
    return value


@contextmanager
def _hashed_meanwhile(path: Path, sha256: str) -> Iterator[None]:
    """Hash a file while the block runs. Raises CacheCorruptError if it is another, whatever the block raised."""
    with ThreadPoolExecutor(1) as aside:
        hashed = aside.submit(sha256_file, path)
        try:
            yield
        finally:
            if hashed.result() != sha256:
                raise CacheCorruptError(f"{path}: not the file that checksums.json names.")


class CropReader:
    """The crops of one view: decoded rows on request, each checked against its CRC-32C before it is decoded.

    Raises CacheCorruptError when opened on a file whose tables do not fit together.
    """

    def __init__(self, view_dir: Path):
        self.path = Path(view_dir) / layout.CROPS_BETON
        crops_npy = Path(view_dir) / layout.CROPS_NPY
        try:
            self._checksums = read_checksums(view_dir)
            with _hashed_meanwhile(crops_npy, self._checksums["files"][layout.CROPS_NPY]):
                self.crops = read_npy(crops_npy, CROP_DTYPE)
                if self.crops.ndim != 1:
                    raise CacheCorruptError(f"{crops_npy}: has shape {self.crops.shape}, one record a row is needed.")
                self._open_tables()
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{error.filename}: is missing.") from None

    def _open_tables(self) -> None:
        """Map the file and see that its tables are those of `crops`."""
        n_rows = len(self.crops)
        try:
            with open_plain(self.path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            n_bytes = len(self._map)
        except FileNotFoundError:
            mend = f"teacher-cache crop --repair --images DIR {quoted(self.path.parent.parent)}"
            raise CacheCorruptError(f"{self.path}: is missing. Its crops are cut again by: {mend}") from None
        except NotAllowedError:
            raise
        except (OSError, ValueError) as error:
            raise CacheCorruptError(f"{self.path}: cannot be read ({error}).") from error
        self.bytes = np.frombuffer(self._map, "u1")
        """The whole file, mapped. Its address is what compiled code reads from."""
        weakref.finalize(self, sigbus.forget, sigbus.watch(self.bytes.ctypes.data, n_bytes, self.path))
        try:
            header = np.frombuffer(self._map, _HEADER, 1)[0]
            if (header["version"], header["num_fields"], header["num_samples"]) != (2, 2, n_rows) or n_rows == 0:
                raise ValueError("header")
            samples = np.frombuffer(self._map, _SAMPLE, n_rows, _HEADER.itemsize + 2 * _FIELD.itemsize)
            allocations = np.frombuffer(self._map, _ALLOCATION, n_rows, int(header["alloc_table_ptr"]))
            image = samples["image"]
            if not (
                np.array_equal(allocations["sample_id"], np.arange(n_rows))
                and np.array_equal(allocations["ptr"], image["data_ptr"])
                and np.array_equal(allocations["size"], self.crops["bytes"])
                and (image["data_ptr"] < n_bytes).all()
                and (allocations["size"] <= n_bytes - image["data_ptr"]).all()
                and (image["mode"] == image["mode"][0]).all()
                and image["mode"][0] <= _RAW
                and (image["height"] == image["width"]).all()
                and (image["height"] == image["height"][0]).all()
                and 1 <= int(image["height"][0]) <= LARGEST_SIZE
            ):
                raise ValueError("tables")
        except (ValueError, OverflowError) as error:
            raise CacheCorruptError(
                f"{self.path}: header or tables do not fit crops.npy ({error}). Make the view again: delete "
                f"{self.path.parent} and run teacher-cache crop."
            ) from error
        self.size = int(image["height"][0])
        """Side of a crop, pixels."""
        self.labels = np.array(samples["label"])
        """int64 [n_rows], -1 where there are none."""
        # contiguous tables for compiled code: where each encoded crop lies, how long it is, its CRC-32C
        self.pointers, self.sizes = allocations["ptr"].copy(), allocations["size"].copy()
        self.crcs = self.crops["crc32c"].copy()
        self.is_jpeg = bool(image["mode"][0] == _JPEG)

    def __len__(self) -> int:
        return len(self.crops)

    def decoded(self) -> dict:
        """{"rows", "crc32c"} of the decoded pixels of at most DECODER_CHECKS evenly spaced crops, for checksums.json."""
        rows = np.linspace(0, len(self) - 1, min(DECODER_CHECKS, len(self))).astype("int64").tolist()
        return {"rows": rows, "crc32c": [crc32c(self._decode(row)) for row in rows]}

    def _decode(self, row: int) -> np.ndarray:
        """The pixels of one row, uint8 [size, size, 3], without the compiled loops."""
        from ..kernels.decoder import decode

        data, out = self.bytes[self.pointers[row] :][: self.sizes[row]], np.empty((self.size, self.size, 3), "uint8")
        check_crops(np.array([decode(data, int(self.crcs[row]), self.is_jpeg, out)]), [row], self.path)
        return out

    def each(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The pixels of `rows` one by one, uint8 [size, size, 3], decoded at most DECODED_BYTES at a time."""
        n_rows = max(1, DECODED_BYTES // (3 * self.size**2))
        for start in range(0, len(rows), n_rows):
            yield from self.read(rows[start : start + n_rows])

    def require_same_decoder(self) -> None:
        """Raise MismatchError if this machine decodes the crops to other pixels than the one that made them.

        FFCV decodes with the system's libjpeg-turbo, and a teacher's targets hold only for the pixels it saw.
        """
        before, now = self._checksums.get("decoded"), self.decoded()
        if before is None:
            raise CacheCorruptError(f"{self.path.with_name(layout.CHECKSUMS_JSON)}: it does not say how the crops were decoded.")
        if before != now:
            differing = sum(a != b for a, b in zip(before["crc32c"], now["crc32c"], strict=False))
            raise MismatchError(
                f"{self.path}: {differing} of {len(now['rows'])} crops decode to other pixels here than where they were made. "
                "This machine's libjpeg-turbo differs; use the same version, or make the crops here (--crop-format raw is exact "
                "everywhere)."
            )

    def announce(self, rows: np.ndarray) -> None:
        """Let the kernel begin to read the crops of `rows` from the disk, for a `read` that comes soon; does not wait for it."""
        from ..kernels.loops import advise

        base = np.full(len(rows), self.bytes.ctypes.data, "uint64")
        advise(np.stack([base, self.pointers[rows], self.sizes[rows]], 1), False)

    def read(self, rows, out: np.ndarray | None = None) -> np.ndarray:
        """Decode `rows` into `out` (uint8 [len(rows), size, size, 3], RGB), in that order, on all of numba's threads.

        Raises NotInCacheError for rows outside the view, CacheCorruptError naming the row for damaged bytes.
        """
        from ..kernels.loops import decode_rows

        rows = np.ascontiguousarray(rows, "int64")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise NotInCacheError(f"{self.path}: rows {rows.min()} to {rows.max()} asked for, it has 0 to {len(self) - 1}.")
        if out is None:
            out = np.empty((len(rows), self.size, self.size, 3), "uint8")
        assert out.shape == (len(rows), self.size, self.size, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
        errors = np.zeros(len(rows), "int64")
        decode_rows(rows, out, np.uint64(self.bytes.ctypes.data), self.pointers, self.sizes, self.crcs, self.is_jpeg, errors)
        check_crops(errors, rows, self.path)
        return out


def tables_sha256(path: Path) -> str:
    """SHA-256 of everything in a .beton that is not crop data: header, fields, sample table, allocation table, padding.

    Raises CacheCorruptError for a file whose tables cannot be followed.
    """
    damaged = CacheCorruptError(f"{path}: its header or allocation table is damaged.")
    n_bytes = path.stat().st_size
    if n_bytes < _HEADER.itemsize:
        raise damaged
    digest = hashlib.sha256()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = np.frombuffer(data[: _HEADER.itemsize], _HEADER)[0]
        table_start = int(header["alloc_table_ptr"])
        if n_bytes - table_start != int(header["num_samples"]) * _ALLOCATION.itemsize:
            raise damaged
        allocations = np.frombuffer(data[table_start:], _ALLOCATION)
        starts, sizes = allocations["ptr"].tolist(), allocations["size"].tolist()
        position = 0
        for start, size in zip([*starts, table_start], [*sizes, 0], strict=True):  # hash what lies between the crops
            if not position <= start <= table_start:
                raise damaged
            digest.update(data[position:start])
            position = start + size
        digest.update(data[table_start:])
    return digest.hexdigest()
