"""crops.beton: FFCV reads what we write, pixels are exact, and damage is named, never decoded."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cache_fakes import crop_folder, flip_bit
from ffcv.libffcv import imdecode
from ffcv.reader import Reader
from PIL import Image

from teacher_cache.crops.beton import MAX_PAGE, MIN_PAGE, CropReader, tables_sha256, write_beton
from teacher_cache.errors import CacheCorruptError, MismatchError, NotInCacheError
from teacher_cache.files.durable import crc32c, npy_bytes, read_npy, read_sealed, seal, sha256_file
from teacher_cache.format.crop_record import CROP_DTYPE


@pytest.fixture(scope="module")
def raw_cache(image_folder, tmp_path_factory):
    return crop_folder(tmp_path_factory.mktemp("raw") / "c", image_folder, crop_format="raw")


@pytest.fixture
def view(shared_cache, tmp_path):
    """A copy of a view's crops that a test may damage."""
    for name in ("crops.beton", "crops.npy", "checksums.json"):
        shutil.copy(shared_cache.view(0).path / name, tmp_path)
    return tmp_path


def write(folder, encoded: list[bytes], size=32, crop_format="jpeg95"):
    """A view of made-up crops; labels are the row numbers, negated."""
    crops = np.zeros(len(encoded), CROP_DTYPE)
    crops["bytes"], crops["crc32c"] = [len(data) for data in encoded], [crc32c(data) for data in encoded]
    write_beton(folder / "crops.beton", crops, -np.arange(len(encoded)), size, crop_format, iter(encoded))
    (folder / "crops.npy").write_bytes(npy_bytes(crops))
    sums = {"bytes": (folder / "crops.beton").stat().st_size, "tables_sha256": tables_sha256(folder / "crops.beton")}
    files = {"crops.npy": sha256_file(folder / "crops.npy")}
    (folder / "checksums.json").write_bytes(seal({"crops_id": "0" * 64, "files": files, "crops.beton": sums}))
    return folder / "crops.beton"


# --- FFCV ------------------------------------------------------------------------------------------------------------


def test_ffcv_reads_the_tables(shared_cache):
    """FFCV's own Reader finds both fields, every sample, its label and where it lies."""
    ours = CropReader(shared_cache.view(1).path)
    theirs = Reader(str(shared_cache.view(1).path / "crops.beton"))
    assert theirs.field_names == ["image", "label"] and theirs.num_samples == len(ours) == 24
    assert [type(handler).__name__ for handler in theirs.handlers.values()] == ["RGBImageField", "IntField"]
    image = theirs.metadata["f0"].view([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
    assert set(image["width"]) == set(image["height"]) == {32} and np.array_equal(image["data_ptr"], ours.pointers)
    assert np.array_equal(theirs.metadata["f1"].view("<i8"), ours.labels)
    assert np.array_equal(theirs.alloc_table["ptr"], ours.pointers) and np.array_equal(theirs.alloc_table["size"], ours.sizes)


def test_pixels_are_ffcvs(shared_cache):
    """Our decoder gives the bits of FFCV's stock decoder, in any order, rows repeated or none."""
    reader, data = CropReader(shared_cache.view(0).path), shared_cache.view(0).path / "crops.beton"
    stored = np.fromfile(data, "u1")
    theirs = np.empty((24, 32, 32, 3), "uint8")
    for row in range(24):
        start, size = int(reader.pointers[row]), int(reader.sizes[row])
        imdecode(stored[start : start + size], theirs[row], 32, 32, 32, 32, 0, 0, 1, 1, False, False)
    rows = [5, 0, 23, 5, 11]
    assert np.array_equal(reader.read(range(24)), theirs) and np.array_equal(reader.read(rows), theirs[rows])
    assert reader.read([]).shape == (0, 32, 32, 3)
    for row in range(24):  # Pillow decodes the same picture, though not the same bits
        pillow = Image.open(io.BytesIO(stored[int(reader.pointers[row]) :].tobytes()))
        assert np.abs(theirs[row].astype(int) - np.asarray(pillow, int)).mean() < 4


def test_raw_crops_are_exact(raw_cache):
    """Raw crops come back as the bytes they were, and FFCV's tables call them raw."""
    reader = CropReader(raw_cache.view(0).path)
    stored = np.fromfile(raw_cache.view(0).path / "crops.beton", "u1")
    for row, pixels in enumerate(reader.read(range(24))):
        assert stored[int(reader.pointers[row]) :][:3072].tobytes() == pixels.tobytes()
    modes = Reader(str(reader.path)).metadata["f0"].view([("mode", "u1"), ("rest", "V12")])["mode"]
    assert not reader.is_jpeg and set(modes) == {1}


@pytest.mark.parametrize("kind", ["shared_cache", "raw_cache"])
def test_a_few_crops_without_the_loops(request, kind):
    """What is decoded one by one has the bits of what the compiled loops decode, and names the same damage."""
    reader = CropReader(request.getfixturevalue(kind).view(0).path)
    rows = list(range(24))
    for each, pixels in zip(map(reader._decode, rows), reader.read(rows), strict=True):
        assert np.array_equal(each, pixels)
    reader.crcs = reader.crcs ^ np.uint32(1)
    for read in (reader._decode, lambda row: reader.read([row])):
        with pytest.raises(CacheCorruptError, match="the crop of row 7 is damaged .its CRC-32C does not fit.; 1 of the 1 rows"):
            read(7)


def test_verify_loads_no_compiler(shared_cache):
    """Every byte is checked, and crops are decoded, without numba, whose import takes longer than that."""
    code = "import sys, teacher_cache; assert teacher_cache.verify(sys.argv[1]) == []; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(shared_cache.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_rows_outside(shared_cache):
    """Rows that a view does not have are refused with the range that it has."""
    for rows in ([24], [-1], [0, 99]):
        with pytest.raises(NotInCacheError, match="it has 0 to 23"):
            CropReader(shared_cache.view(0).path).read(rows)


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [3000] * 50, [1, 4096, 4095, 2], [5_000_000, 5_000_000, 10], [9_000_000, 1, 9_000_000]])
def test_no_crop_crosses_a_page(tmp_path, sizes):
    """Crops lie in row order, none crosses a page, and FFCV accepts the page."""
    path = write(tmp_path, [bytes([i % 256]) * size for i, size in enumerate(sizes)])
    page = Reader(str(path)).page_size
    reader = CropReader(tmp_path)
    start, end = reader.pointers, reader.pointers + reader.sizes
    assert (start[1:] >= end[:-1]).all() and (start // page == (end - 1) // page).all()
    assert page & (page - 1) == 0 and page >= max(MIN_PAGE, max(sizes)) and (page <= MAX_PAGE or max(sizes) > MAX_PAGE)
    data = path.read_bytes()
    for i, size in enumerate(sizes):
        assert data[int(start[i]) : int(end[i])] == bytes([i % 256]) * size
    assert reader.labels.tolist() == [-i for i in range(len(sizes))]


def test_same_input_same_bytes(tmp_path, shared_cache):
    """Written twice, a file has the same bytes: nothing in it is left to chance, padding included."""
    encoded = [bytes([i]) * (i * 37 % 900 + 1) for i in range(40)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, encoded)
    assert (tmp_path / "a/crops.beton").read_bytes() == (tmp_path / "b/crops.beton").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


UNFIT = [([b"ab", b"c"], "2 crops given for 3"), ([b"ab", b"cd", b"e"], "row 1 has 2 bytes")]


@pytest.mark.parametrize(("given", "words"), UNFIT)
def test_crops_must_fit_their_records(tmp_path, given, words):
    """Fewer crops than records, or one of another size, leave no file behind."""
    crops = np.zeros(3, CROP_DTYPE)
    crops["bytes"] = 2, 1, 1
    with pytest.raises(CacheCorruptError, match=words):
        write_beton(tmp_path / "crops.beton", crops, np.zeros(3, "int64"), 32, "jpeg95", iter(given))
    assert not (tmp_path / "crops.beton").exists()


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 13, 23])
def test_damaged_crop(view, row):
    """One changed bit in a crop is found before it is decoded and names the row; the other rows stay readable."""
    reader = CropReader(view)
    flip_bit(view / "crops.beton", 8 * int(reader.pointers[row] + reader.sizes[row] // 2) + 3)
    reader = CropReader(view)
    with pytest.raises(CacheCorruptError, match=f"crop of row {row} is damaged .its CRC-32C does not fit.*1 of the 24"):
        reader.read(range(24))
    assert len(reader.read([other for other in range(24) if other != row])) == 23


def test_crop_that_is_no_jpeg(tmp_path):
    """Bytes that are sound but no JPEG are refused by row, not shown as the pixels of the crop before."""
    write(tmp_path, [b"not a JPEG"])
    with pytest.raises(CacheCorruptError, match="row 0 is damaged .the JPEG decoder refuses it"):
        CropReader(tmp_path).read([0])


def test_raw_crop_of_another_size(tmp_path):
    """A raw crop of the wrong length is refused instead of read past its end."""
    write(tmp_path, [b"x" * 3071], crop_format="raw")
    with pytest.raises(CacheCorruptError, match="row 0 is damaged .its size is wrong"):
        CropReader(tmp_path).read([0])


@pytest.mark.parametrize("keep", [0, 1, 31, 32, 2000, 4096, -577, -1])
def test_truncated_file(view, keep):
    """A .beton that was cut anywhere is refused when it is opened."""
    data = (view / "crops.beton").read_bytes()
    (view / "crops.beton").write_bytes(data[:keep])
    with pytest.raises(CacheCorruptError, match="crops.beton: (header|cannot be read)"):
        CropReader(view)
    with pytest.raises(CacheCorruptError, match="header or allocation table is damaged"):
        tables_sha256(view / "crops.beton")


FOREIGN = {
    "text": lambda data: b"hello world " * 1000,
    "zeros": lambda data: bytes(len(data)),
    "grown": lambda data: data + b"x",
    "reversed": lambda data: data[::-1],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_file(view, case):
    """A file that is something else has no checksum of tables, and does not open where its tables do not fit."""
    data = (view / "crops.beton").read_bytes()
    (view / "crops.beton").write_bytes(FOREIGN[case](data))
    with pytest.raises(CacheCorruptError):
        tables_sha256(view / "crops.beton")
    if case != "grown":  # what follows the tables is nothing that is read
        with pytest.raises(CacheCorruptError, match="Make the view again|cannot be read"):
            CropReader(view)


def test_missing_files(view):
    """A missing crops.beton, crops.npy or checksums.json is named."""
    for name in ("crops.beton", "crops.npy", "checksums.json"):
        (view / name).unlink()
        with pytest.raises(CacheCorruptError, match=name):
            CropReader(view)


def test_crops_of_another_view(view, shared_cache):
    """A crops.npy of another view does not open beside this one's pixels, its checksums neither."""
    shutil.copy(shared_cache.view(1).path / "crops.npy", view)
    with pytest.raises(CacheCorruptError, match="crops.npy: not the file that checksums.json names"):
        CropReader(view)
    shutil.copy(shared_cache.view(1).path / "checksums.json", view)
    with pytest.raises(CacheCorruptError, match="do not fit crops.npy"):
        CropReader(view)


def test_no_bit_of_the_tables_leads_astray(view):
    """Whatever bit of header or tables is flipped: refused when opened or read, or the same pixels; and its checksum tells."""
    path, n_tables = view / "crops.beton", 32 + 2 * 1041 + 24 * 32
    sound, checksum = CropReader(view).read(range(24)), tables_sha256(path)
    n_bytes = path.stat().st_size
    bits = [*range(0, 32 * 8, 3), *range((32 + 2 * 1041) * 8, n_tables * 8, 23), *range((n_bytes - 24 * 24) * 8, n_bytes * 8, 23)]
    for bit in bits:
        flip_bit(path, bit)
        try:
            assert np.array_equal(CropReader(view).read(range(24)), sound), bit
        except CacheCorruptError:
            pass
        try:
            assert tables_sha256(path) != checksum, bit
        except CacheCorruptError:
            pass
        flip_bit(path, bit)


def test_no_bit_of_the_records_leads_astray(view):
    """Whatever bit of crops.npy is flipped, it is refused when the view is opened, and numpy never crashes on it."""
    path, sound = view / "crops.npy", np.load(view / "crops.npy")
    header = 8 * (path.stat().st_size - sound.nbytes)
    for bit in range(0, header + 800, 11):
        flip_bit(path, bit)
        with pytest.raises(CacheCorruptError, match="crops.npy: not the file that checksums.json names"):
            CropReader(view)
        try:
            assert read_npy(path, sound.dtype).dtype == sound.dtype
        except CacheCorruptError as error:
            assert "crops.npy: " in str(error)
        flip_bit(path, bit)


def test_another_decoder(view, monkeypatch):
    """A machine that decodes the recorded crops to other pixels is told, before it learns from them."""
    CropReader(view).require_same_decoder()
    reader = CropReader(view)
    decode = reader._decode
    monkeypatch.setattr(reader, "_decode", lambda row: decode(row) ^ (row == 3))
    with pytest.raises(MismatchError, match="1 of 24 crops decode to other pixels here than where they were made"):
        reader.require_same_decoder()


def test_a_view_that_does_not_say_how_it_decodes(tmp_path):
    """Without recorded pixels nothing can be compared: the view is not taken for one that decodes alike."""
    write(tmp_path, [bytes(32 * 32 * 3)], crop_format="raw")
    with pytest.raises(CacheCorruptError, match="checksums.json: it does not say how the crops were decoded"):
        CropReader(tmp_path).require_same_decoder()


@pytest.mark.parametrize("size", [0, 4097, 65535])
def test_crops_of_an_absurd_size(tmp_path, size):
    """Sides beyond those a plan may have are refused when the view is opened, before memory is taken for a crop."""
    write(tmp_path, [b"x"], size=size)
    with pytest.raises(CacheCorruptError, match="header or tables do not fit"):
        CropReader(tmp_path)


def test_records_of_another_shape(view):
    """A crops.npy that is vouched for but no list of records is refused."""
    crops = np.load(view / "crops.npy")
    for shape in ((4, 6), (24, 1), ()):
        (view / "crops.npy").write_bytes(npy_bytes(crops[0] if shape == () else crops.reshape(shape)))
        sums = read_sealed(view / "checksums.json")
        (view / "checksums.json").write_bytes(seal({**sums, "files": {"crops.npy": sha256_file(view / "crops.npy")}}))
        with pytest.raises(CacheCorruptError, match="crops.npy: has shape"):
            CropReader(view)
