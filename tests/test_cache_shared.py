"""A cache that several people share: modes as the umask has them, and what one may not read is called that."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cache_fakes import crop_folder
from click.testing import CliRunner

from teacher_cache.cache import Cache
from teacher_cache.checking.repair import repair_lists
from teacher_cache.checking.verify import verify
from teacher_cache.cli.main import main
from teacher_cache.errors import NotAllowedError
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.files import claims
from teacher_cache.files.claims import claimed
from teacher_cache.files.durable import write_whole
from teacher_cache.files.range_claims import claimed_range
from teacher_cache.format.layout import store_claim, store_claims
from teacher_cache.store.reader import StoreReader


@pytest.fixture(params=[0o022, 0o002, 0o027], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def require_modes(root: Path, umask: int) -> int:
    """Every file and folder below `root` has the mode that the umask gives; returns how many there are."""
    entries = sorted(root.rglob("*"))
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in entries}
    assert {p: oct(stat.S_IMODE(p.stat().st_mode)) for p in entries} == {p: oct(mode) for p, mode in expected.items()}
    return len(entries)


def test_modes_of_a_cache(image_folder, teacher, tmp_path, umask, monkeypatch):
    """Every file of a cache, also its claims and what is still aside, has the mode that the umask gives."""
    root, n_seen, place = tmp_path / "c", [], claims._place
    monkeypatch.setattr(claims, "_place", lambda *a: (place(*a), n_seen.append(require_modes(tmp_path, umask)))[0])
    extract_view(crop_folder(root, image_folder).view(0), "fake", teacher, ExtractPlan("last", shard_rows=8))
    store = root / "view-000/fake.zarr"
    with claimed(root / "crops.claim", "x"), claimed(store_claim(store), "x"), claimed_range(store_claims(store), 0, 1, "x"):
        write_whole(root / "x", b"")
        assert require_modes(tmp_path, umask) > 30
    assert len(n_seen) > 5


# --- what one may not read -------------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user to whom permissions mean something."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture(scope="module")
def shared(image_folder, teacher) -> Iterator[Path]:
    """A cache in a place where anybody may look."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        before = os.umask(0o022)
        extract_view(crop_folder(Path(folder) / "c", image_folder).view(0), "fake", teacher, ExtractPlan("last", shard_rows=8))
        os.umask(before)
        yield Path(folder) / "c"


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Only root may look into `path` while the block runs."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0o700 if path.is_dir() else 0o600)
    try:
        with nobody():
            yield
    finally:
        path.chmod(mode)


STORE = "view-000/fake.zarr"
READS = {
    "cache.json": lambda cache: Cache(cache),
    "images.txt": lambda cache: Cache(cache).images(),
    "view-000/checksums.json": lambda cache: Cache(cache).view(0).crops_sha256,
    f"{STORE}/store.json": lambda cache: StoreReader(cache / STORE),
    f"{STORE}/zarr.json": lambda cache: StoreReader(cache / STORE),
    f"{STORE}/complete.json": lambda cache: StoreReader(cache / STORE),
    f"{STORE}/tokens/06/c.1.0.0": lambda cache: StoreReader(cache / STORE).read("tokens/06", [8]),
    ".": lambda cache: Cache(cache),
}


@pytest.mark.parametrize("name", READS)
def test_a_refusal_is_no_damage(shared, name):
    """A file of a cache that this user may not read is called that, with its owner and what to do; not missing, not bad."""
    with closed(shared / name), pytest.raises(NotAllowedError) as caught:
        READS[name](shared)
    path = shared / name if name != "." else shared
    right = "x" if name == "." else "r"
    mode = "700" if name == "." else "600"
    whose = f"{path} belongs to root" if name == "." else "it belongs to root"
    ask = f"Ask root for chmod g+{right} (or o+{right}) {path}, or do this as root."
    assert str(caught.value).endswith(f": permission denied: {whose} and has mode {mode}. {ask}")


@pytest.mark.parametrize("name", ["cache.json", "view-000/crops.npy", f"{STORE}/store.json", f"{STORE}/tokens/06/c.1.0.0"])
def test_what_is_not_read_is_not_judged(shared, name):
    """verify calls what it may not read unchecked, never damaged; repair writes nothing over it."""
    with closed(shared / name):
        if name != "cache.json":
            findings, _ = verify(Cache(shared))
            assert {finding.kind for finding in findings} == {"unchecked"} and "permission denied" in findings[0].message
        result = CliRunner().invoke(main, ["verify", str(shared)])
    assert result.exit_code in (1, 2) and "ermission denied" in result.output
    assert not list(repair_lists(shared))


def test_the_command_says_it(shared):
    """A command that meets such a file ends with one sentence and code 1."""
    with closed(shared / "cache.json"):
        result = CliRunner().invoke(main, ["inspect", str(shared)])
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {shared / 'cache.json'}: permission denied: it belongs to")
