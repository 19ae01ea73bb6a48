"""Small files that are either whole or absent, JSON that notices a changed bit, and names that cannot lead elsewhere.

Every file of a cache that is not written row by row goes through `write_whole`: aside, fsync, rename, fsync of the folder. What
is read from a cache is not trusted: before memory is taken for a file it has to be a plain one of a size that makes sense, and a
name that metadata gives becomes a path through `inside` only.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import pwd
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import google_crc32c

from ..errors import BadInputError, CacheCorruptError, ClaimLostError, NotAllowedError
from . import guard

if TYPE_CHECKING:
    import numpy as np

ASIDE = ".partial"
"""End of the name of a file or folder that is still being written. Nothing reads one; a new writer replaces it."""
MAX_JSON = 32 << 20
"""Bytes of a JSON file. The largest that are written list the classes of a cache, a few hundred thousand would fit."""
_LEFT = re.compile(r"(.+)\.[0-9a-f]{16}\.partial")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def crc32c(data, previous: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes-like `data`, continued from `previous`."""
    return google_crc32c.extend(previous, bytes(data) if isinstance(data, memoryview) else data)


def is_sha256(text) -> bool:
    """Whether `text` is a SHA-256 as caches spell it: 64 lower-case hex digits."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- names and files ---------------------------------------------------------------------------------------------------


def is_safe_name(name) -> bool:
    """Whether `name` is a relative path with `/` between its parts that cannot step out of the folder it is joined to."""
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def inside(root: Path, name: str) -> Path:
    """The path `root`/`name`, which need not exist.

    Raises CacheCorruptError for a name that is absolute or steps up, and if a symlink on the way leads out of `root`. `root`
    itself may be reached through a symlink.
    """
    if not is_safe_name(name):
        raise CacheCorruptError(f"{root}: {name!r} is no name of a file in it.")
    path = root / name
    try:
        leads_out = not path.resolve().is_relative_to(root.resolve())
        _require_no_loop(path)
    except (OSError, RuntimeError, ValueError) as error:  # surrogates are a ValueError
        raise CacheCorruptError(f"{root}: {name!r} leads nowhere ({error}).") from error
    if leads_out:
        raise CacheCorruptError(f"{path} is, or lies behind, a symlink that leads out of {root}. Put the folder itself there.")
    return path


def _require_no_loop(path: Path) -> None:
    """Raise OSError for a loop of symlinks: of `Path.resolve` it is a RuntimeError before Python 3.13, and nothing since."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise


def link_fault(path: Path) -> str | None:
    """What is wrong with a file of a cache that is a symlink, a sentence without its path; None if it is none."""
    return f"is a symbolic link to {path.readlink()}. Put the file or folder itself there." if path.is_symlink() else None


def open_plain(path: Path) -> BinaryIO:
    """Open a file of a cache for reading, unbuffered.

    Raises FileNotFoundError if there is none, NotAllowedError if this user may not read it, CacheCorruptError if it is
    a symlink, a folder, a pipe or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not make us wait
    except (FileNotFoundError, NotADirectoryError):
        raise
    except PermissionError as error:
        raise NotAllowedError(not_allowed(path)) from error
    except OSError as error:
        reason = "it is a symlink" if error.errno == errno.ELOOP else error.strerror
        raise CacheCorruptError(f"{path}: cannot be read ({reason}).") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CacheCorruptError(f"{path}: cannot be read (it is no plain file).")
    return open(descriptor, "rb", buffering=0)


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a file of a cache; CacheCorruptError, before they are read, if there are more than `most`."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CacheCorruptError(f"{path}: has {size} bytes; a sound one has at most {most}.")
        with io.BufferedReader(file) as whole:
            return whole.read()


def _may(path: Path, how: int) -> bool:
    return os.access(path, how, effective_ids=True)


def not_allowed(path: Path) -> str:
    """What to say where `path`, which is there or may be, was refused to this user: whose it is, and what to do."""
    path = Path(path).absolute()
    place = next((folder for folder in reversed(path.parents) if not _may(folder, os.X_OK)), path)
    right = "x" if place != path else "r"
    status = place.stat()
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    where = "it" if place == path else place
    return (
        f"{path}: permission denied: {where} belongs to {owner} and has mode {stat.S_IMODE(status.st_mode):03o}. Ask {owner} for "
        f"chmod g+{right} (or o+{right}) {place}, or do this as {owner}."
    )


def allowed_by(error: OSError) -> str:
    """What an error says that may be a refusal to read: whose the file is, if it is one; else its own words."""
    path = error.filename
    refused = error.errno == errno.EACCES and isinstance(path, str | Path) and error.strerror == os.strerror(errno.EACCES)
    if not refused or _may(path, os.R_OK) or _is_missing(Path(path)):
        return f"{path}: {error.strerror}" if path else str(error)
    return not_allowed(Path(path))


def _is_missing(path: Path) -> bool:
    """Whether `path` was to be made: nothing is there, as far as one may look."""
    try:
        return not os.path.lexists(path) and _may(path.parent, os.X_OK)
    except OSError:
        return False


def _umask() -> int:
    """The process's umask, without changing it for an instant, in which another thread might make a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise OSError(errno.ENOSYS, "the kernel does not tell the umask (Linux before 4.7)", "/proc/self/status")


def settle(path: Path) -> None:
    """Of a file that a library wrote: bring it onto the disk, and give it the mode that `open` would have given it."""
    path.chmod(0o666 & ~_umask())  # some are made for their owner alone
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_cache_folder() -> Path:
    """Where this user's programs keep what they can make again: `$XDG_CACHE_HOME`, else ~/.cache. OSError without a home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "this user has no home folder") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless they are there. Their names survive a power cut."""
    path = Path(path)
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, "a file stands where a folder is needed", str(path))
    make_folder(path.parent)
    path.mkdir(exist_ok=True)  # another process may be as fast
    sync_folder(path.parent)


def aside_path(path: Path) -> Path:
    """Where to write what is to become `path`: beside it, under its name and ASIDE.

    Under a claim the claim's token stands between the two, so that a writer that was stopped and woke, and the one that has taken
    over from it, never write into one file.
    """
    path = Path(path)
    claims = guard.claims_on(path)
    return path.with_name(f"{path.name}.{claims[0].token}{ASIDE}" if claims else f"{path.name}{ASIDE}")


def clear_aside(path: Path) -> Path:
    """`aside_path`, where nothing is now; what earlier writers of `path` left under such a name is gone too.

    A claim on `path` is what makes them earlier writers: without one only the very name is cleared. Raises ClaimLostError if it
    has been taken over.
    """
    path = Path(path)
    aside = aside_path(path)
    for left in {aside.name, f"{path.name}{ASIDE}", *_left_by_others(path)}:
        place = path.with_name(left)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        elif os.path.lexists(place):
            place.unlink(missing_ok=True)
    return aside


def _left_by_others(path: Path) -> list[str]:
    """Names beside `path` that end in ASIDE and that dead writers of it have left. Each folder is listed once a claim."""
    found = []
    for claim in guard.claims_on(path)[:1]:
        folder = path.parent.absolute()
        if folder not in claim.leftovers:
            left = [entry.name for entry in folder.iterdir() if _LEFT.fullmatch(entry.name)]
            guard.require_held(path)  # so nobody who has taken over from us can have left any of these
            claim.leftovers[folder] = left
        found = [name for name in claim.leftovers[folder] if _LEFT.fullmatch(name)[1] == path.name]
    return found


def create_aside(path: Path, buffering: int = -1) -> BinaryIO:
    """A new file for writing, at `aside_path`; what stood there before is gone.

    Never follows a symlink that somebody left under that name.
    """
    return open(clear_aside(path), "xb", buffering=buffering)


def publish(aside: Path, path: Path) -> None:
    """Give a file or folder that was written aside, and is on the disk, its name; it survives a power cut from then on.

    A file that was there under that name is replaced. Raises ClaimLostError if another process has taken over meanwhile; what
    was written aside is gone then.
    """
    try:
        guard.require_held(path)
    except ClaimLostError:
        if aside != path and aside.name.endswith(ASIDE):
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise
    os.replace(aside, path)
    sync_folder(Path(path).parent)


def remove(path: Path) -> None:
    """Remove a file; it stays removed after a power cut. ClaimLostError as for `publish`."""
    guard.require_held(path)
    path.unlink()
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and all that is in it; as `remove`. NotADirectoryError for a file."""
    guard.require_held(path)
    shutil.rmtree(path)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that a crash at any moment leaves the old file, the new one or none, never a part."""
    path = Path(path)
    with create_aside(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(Path(file.name), path)


# --- arrays ------------------------------------------------------------------------------------------------------------


def npy_bytes(array: np.ndarray) -> bytes:
    """The .npy file of `array`; object arrays (pickles) are refused."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: Path, dtype, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Load a .npy that `npy_bytes` wrote: version 1.0, C order, of this dtype and, if given, shape.

    Raises CacheCorruptError for any other file, also one whose header promises more or less than the file holds, before memory is
    taken for it; FileNotFoundError for none.
    """
    import numpy as np

    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("version")
            found_shape, fortran_order, found_dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # the header is parsed as Python text, and numpy lets nearly anything through
            raise CacheCorruptError(f"{path}: not a readable .npy file ({error}).") from error
        if found_dtype != np.dtype(dtype) or fortran_order:
            raise CacheCorruptError(f"{path}: expected dtype {np.dtype(dtype)}, found {found_dtype}.")
        if shape is not None and found_shape != tuple(shape):
            raise CacheCorruptError(f"{path}: has shape {found_shape}, {tuple(shape)} is needed.")
        n_bytes = math.prod(found_shape) * found_dtype.itemsize
        if min(found_shape, default=0) < 0 or size - file.tell() != n_bytes:
            raise CacheCorruptError(f"{path}: its header promises {n_bytes} bytes of values, {size - file.tell()} are there.")
        return np.fromfile(file, found_dtype, math.prod(found_shape)).reshape(found_shape)


# --- JSON --------------------------------------------------------------------------------------------------------------


def canonical_json(value) -> bytes:
    """One spelling for one value, so that hashes of JSON mean something."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def seal(value: dict) -> bytes:
    """The bytes of a JSON file that carries the CRC-32C of its own content. BadInputError if no reader would take it."""
    data = canonical_json({**value, "crc32c": crc32c(canonical_json(value))})
    if len(data) > MAX_JSON:
        raise BadInputError(f"{len(data):,} bytes of JSON, at most {MAX_JSON:,} are read: there are too many classes or names.")
    return data


def unseal(data: bytes, path: Path | str) -> dict:
    """The value of a sealed JSON file. Any changed bit, cut or foreign file raises CacheCorruptError, which names `path`."""
    try:
        value = json.loads(data)
        claimed = value.pop("crc32c")
        intact = crc32c(canonical_json(value)) == claimed and data == seal(value)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CacheCorruptError(f"{path}: its own checksum does not fit; the file was damaged or edited by hand.")
    return value


def read_sealed(path: Path) -> dict:
    """Read what `seal` wrote; as `unseal`, and FileNotFoundError for a missing file."""
    return unseal(read_plain(path, MAX_JSON), path)


def listed_files(value: dict, path: Path) -> dict[str, str]:
    """The member `files` of sealed JSON, name -> SHA-256 of the small files beside it; `path` is for the message.

    Raises CacheCorruptError unless all names are safe, of at most 100 bytes (tar holds no more), and all sums are SHA-256.
    """
    files = value.get("files")
    if not isinstance(files, dict) or not all(
        is_safe_name(name) and name.isascii() and len(name) <= 100 and is_sha256(sum_) for name, sum_ in files.items()
    ):
        raise CacheCorruptError(f"{path}: `files` must give the SHA-256 of files in this folder, by their names.")
    return files
