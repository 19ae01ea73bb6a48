"""The inner loops: CRC-32C, decoding of crops and copying of rows, compiled by numba, parallel, without the GIL.

Nothing here checks shapes or bounds of its arguments beyond what each docstring says; the readers do. Errors are reported as
codes in an array, because an exception cannot leave compiled code that FFCV runs in its worker thread.
"""

from __future__ import annotations

import platform

from .pointers import load_u64, load_u8, pointer_u8  # isort: skip - before numba, whose threading layer it chooses

import numba
import numpy as np
from llvmlite import ir
from numba import carray, prange, types
from numba.extending import intrinsic

from ..format.shards import CLOSED, EMPTY_SLOT
from .codes import BAD_CRC, BAD_JPEG, BAD_SIZE, CUT_SHORT, MISSING, NOT_OPEN, OK
from .compiled import IS_PARALLEL, kernel
from .crc_instruction import crc_instruction
from .outside import fadvise, imdecode, madvise, memcpy, pread


def _table(polynomial: int = 0x82F63B78) -> np.ndarray:
    """The 256 CRC-32C values of single bytes (reflected Castagnoli polynomial)."""
    values = np.arange(256, dtype="uint32")
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(polynomial), values >> 1).astype("uint32")
    return values


_TABLE = _table()
_INSTRUCTION = crc_instruction()


@intrinsic
def _crc32c_word(typingctx, crc, word):
    """CRC-32C of 8 bytes in one instruction."""

    def codegen(context, builder, signature, arguments):
        return _INSTRUCTION.call(builder, *arguments)

    return types.uint64(types.uint64, types.uint64), codegen


if _INSTRUCTION:

    @kernel()
    def crc32c_at(address, n_bytes):
        """CRC-32C of `n_bytes` at `address`."""
        crc = np.uint64(0xFFFFFFFF)
        n_words = n_bytes // np.uint64(8)
        for i in range(n_words):
            crc = _crc32c_word(crc, load_u64(address + np.uint64(8) * np.uint64(i)))
        for i in range(n_words * np.uint64(8), n_bytes):
            byte = np.uint64(load_u8(address + np.uint64(i)))
            crc = np.uint64(_TABLE[(crc ^ byte) & np.uint64(255)]) ^ (crc >> np.uint64(8))
        return np.uint32(crc ^ np.uint64(0xFFFFFFFF))

else:

    @kernel()
    def crc32c_at(address, n_bytes):
        """CRC-32C of `n_bytes` at `address`, a byte at a time (what is compiled for has no instruction that we use)."""
        crc = np.uint64(0xFFFFFFFF)
        for i in range(n_bytes):
            byte = np.uint64(load_u8(address + np.uint64(i)))
            crc = np.uint64(_TABLE[(crc ^ byte) & np.uint64(255)]) ^ (crc >> np.uint64(8))
        return np.uint32(crc ^ np.uint64(0xFFFFFFFF))


_WILLNEED = 3  # of madvise and of posix_fadvise


STREAMED = 1 << 15
"""Bytes of a row from which it is copied past the processor's caches: they are not filled with what nobody reads soon, and memory
that is written need not be fetched first, which makes a third less traffic."""


@intrinsic
def _stream_64(typingctx, target, source):
    """Copy 64 bytes with non-temporal stores; `target` is a multiple of 16."""

    def codegen(context, builder, signature, arguments):
        word, vector = ir.IntType(64), ir.VectorType(ir.IntType(64), 2)
        to, of = (
            [builder.inttoptr(builder.add(address, ir.Constant(word, 16 * i)), vector.as_pointer()) for i in range(4)]
            for address in arguments
        )
        mark = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for value, place in zip([builder.load(place, align=1) for place in of], to, strict=True):
            builder.store(value, place, align=16).set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


@intrinsic
def _store_fence(typingctx):
    """Streamed stores are seen by other threads before anything that this thread stores from here on."""

    def codegen(context, builder, signature, arguments):
        fence = builder.module.declare_intrinsic("llvm.x86.sse.sfence", fnty=ir.FunctionType(ir.VoidType(), []))
        builder.call(fence, [])
        return context.get_dummy_value()

    return types.void(), codegen


if platform.machine() in ("x86_64", "AMD64"):

    @kernel()
    def copy_bytes(target, source, n_bytes, is_read_soon):
        """memcpy; of much that is not read soon, past the processor's caches."""
        if is_read_soon or n_bytes < np.uint64(STREAMED):
            memcpy(target, source, n_bytes)
            return
        first = (np.uint64(64) - (target & np.uint64(63))) & np.uint64(63)  # to where a line of the cache begins
        memcpy(target, source, first)
        n_lines = (n_bytes - first) >> np.uint64(6)
        for i in range(n_lines):
            at = first + np.uint64(64) * np.uint64(i)
            _stream_64(target + at, source + at)
        _store_fence()
        done = first + np.uint64(64) * n_lines
        memcpy(target + done, source + done, n_bytes - done)

else:

    @kernel()
    def copy_bytes(target, source, n_bytes, is_read_soon):
        """memcpy."""
        memcpy(target, source, n_bytes)


@kernel()
def decode_one(source, n_bytes, crc, is_jpeg, out):
    """Check and decode the encoded crop at address `source` into `out` (uint8 [size, size, 3]); returns a code."""
    if crc32c_at(source, n_bytes) != crc:
        return BAD_CRC
    height, width = out.shape[0], out.shape[1]
    if is_jpeg:
        # FFCV's decoder: libjpeg-turbo, fast DCT; the trailing arguments are offset, scale 1/1, no crop, no flip
        code = imdecode(source, n_bytes, height, width, out.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)
        return OK if code == 0 else BAD_JPEG
    if n_bytes != np.uint64(height * width * 3):
        return BAD_SIZE
    memcpy(out.ctypes.data, source, n_bytes)
    return OK


@kernel(parallel=True)
def decode_rows(rows, out, base, pointers, sizes, crcs, is_jpeg, errors):
    """Decode crops `rows` of a .beton mapped at address `base` into `out`; `errors` int64 [len(rows)] receives codes."""
    for i in prange(len(rows)):
        row = rows[i]
        errors[i] = decode_one(base + pointers[row], sizes[row], crcs[row], is_jpeg, out[i])


@kernel()
def _judge_entry(offset, n_bytes, shard_bytes, row_bytes):
    """A code for one entry of a shard's index: whether it can be that of an uncompressed row."""
    if offset == np.uint64(EMPTY_SLOT):
        return MISSING
    if n_bytes != row_bytes + np.uint64(4) or offset > shard_bytes or n_bytes > shard_bytes - offset:
        return BAD_SIZE
    return OK


@kernel()
def _find(shard, shard_bytes, slot, n_slots, row_bytes):
    """Of one uncompressed row of a shard mapped at address `shard`: a code, and the address of its bytes.

    The last 16 * n_slots + 4 bytes of a shard are its index (shards.py).
    """
    entry = shard + shard_bytes - np.uint64(4) - np.uint64(16) * np.uint64(n_slots - slot)
    offset = load_u64(entry)
    return _judge_entry(offset, load_u64(entry + np.uint64(8)), shard_bytes, row_bytes), shard + offset


@kernel()
def _crc_behind(row, row_bytes):
    """The CRC-32C that follows the row at address `row`."""
    stored = np.uint64(0)
    for i in range(4):
        stored |= np.uint64(load_u8(row + row_bytes + np.uint64(i))) << np.uint64(8 * i)
    return stored


@kernel()
def copy_one(shard, shard_bytes, slot, n_slots, row_bytes, check, out):
    """Copy one uncompressed row out of a shard mapped at address `shard` to address `out`; returns a code."""
    code, source = _find(shard, shard_bytes, slot, n_slots, row_bytes)
    if code != OK:
        return code
    copy_bytes(np.uint64(out), source, row_bytes, check)
    # of the copy: what was handed out is what was checked, and it is in the processor's cache
    if check and np.uint64(crc32c_at(np.uint64(out), row_bytes)) != _crc_behind(source, row_bytes):
        return BAD_CRC
    return OK


@kernel()
def _fill(out, n_bytes, descriptor, offset):
    """Read `n_bytes` at `offset` of a file to address `out`; False if they are not there or cannot be read."""
    done = np.uint64(0)
    while done < n_bytes:
        n_read = pread(descriptor, out + done, n_bytes - done, offset + done)
        if n_read <= 0:
            return False
        done += np.uint64(n_read)
    return True


@kernel()
def read_one(descriptor, shard_bytes, slot, n_slots, row_bytes, check, out):
    """What `copy_one` does, with pread of an open file: one that was cut short is a code and not the end of the process."""
    words = np.zeros(2, np.uint64)
    at = np.uint64(words.ctypes.data)
    entry = shard_bytes - np.uint64(4) - np.uint64(16) * np.uint64(n_slots - slot)
    if not _fill(at, np.uint64(16), descriptor, entry):
        return CUT_SHORT
    offset, n_bytes = words[0], words[1]
    code = _judge_entry(offset, n_bytes, shard_bytes, row_bytes)
    if code != OK:
        return code
    if not _fill(out, row_bytes, descriptor, offset):
        return CUT_SHORT
    if check:
        words[0] = 0
        if not _fill(at, np.uint64(4), descriptor, offset + row_bytes):
            return CUT_SHORT
        if np.uint64(crc32c_at(np.uint64(out), row_bytes)) != words[0]:
            return BAD_CRC
    return OK


@kernel(parallel=True)
def copy_rows(rows, out, out_stride, handles, shard_sizes, by_pread, shard_rows, row_bytes, checked, check, errors):
    """Copy `rows` of one uncompressed array into `out` (address), `out_stride` bytes apart.

    handles: uint64 [n_shards], addresses of mapped shards or, if `by_pread`, file descriptors; CLOSED where a shard is not open.
    checked: uint8 [n_rows], rows whose CRC-32C has been found right by this process. check: 0 never, 1 first time, 2 always.
    errors: int64 [len(rows)] receives codes.
    """
    for i in prange(len(rows)):
        row = rows[i]
        shard, slot = row // shard_rows, row % shard_rows
        if handles[shard] == np.uint64(CLOSED):
            errors[i] = NOT_OPEN
            continue
        verify = check == 2 or (check == 1 and checked[row] == 0)
        target = np.uint64(out) + np.uint64(i) * np.uint64(out_stride)
        if by_pread:
            errors[i] = read_one(handles[shard], shard_sizes[shard], slot, shard_rows, row_bytes, verify, target)
        else:
            errors[i] = copy_one(handles[shard], shard_sizes[shard], slot, shard_rows, row_bytes, verify, target)
        if verify and errors[i] == OK:
            checked[row] = 1


@kernel()
def _gather(row, out, places, n_parts, n_tokens, token_bytes):
    """Copy to address `out` the tokens at `places` of each of the `n_parts` parts of a row (uint8 [n_parts * n_tokens *
    token_bytes])."""
    to = np.uint64(out)
    for part in range(n_parts):
        start = np.uint64(row.ctypes.data) + np.uint64(part) * n_tokens * token_bytes
        for place in places:
            memcpy(to, start + np.uint64(place) * token_bytes, token_bytes)
            to += token_bytes


@kernel(parallel=True)
def copy_tokens(rows, places, n_parts, n_tokens, token_bytes, out, out_stride, handles, shard_sizes, by_pread, shard_rows,
                checked, check, errors):  # fmt: skip
    """Copy of each of `rows` only the tokens at its `places` (integer [len(rows), K], each below `n_tokens`; not looked at).

    A row is `n_parts` x `n_tokens` x `token_bytes` (uint64); `out` gets n_parts x K x token_bytes. The rest as for `copy_rows`.
    A checksum is that of a whole row: where it is to be compared all of the row is read, and by pread always. Of a map it is
    taken where the row lies, not of a copy.
    """
    row_bytes = n_parts * n_tokens * token_bytes
    for i in prange(len(rows)):
        row = rows[i]
        shard, slot = row // shard_rows, row % shard_rows
        handle, shard_bytes = handles[shard], shard_sizes[shard]
        if handle == np.uint64(CLOSED):
            errors[i] = NOT_OPEN
            continue
        verify = check == 2 or (check == 1 and checked[row] == 0)
        if by_pread:
            stored = np.empty(row_bytes, np.uint8)
            code = read_one(handle, shard_bytes, slot, shard_rows, row_bytes, verify, np.uint64(stored.ctypes.data))
        else:
            code, source = _find(handle, shard_bytes, slot, shard_rows, row_bytes)
            if verify and code == OK and np.uint64(crc32c_at(source, row_bytes)) != _crc_behind(source, row_bytes):
                code = BAD_CRC
            stored = carray(pointer_u8(source), row_bytes)
        errors[i] = code
        if code == OK:
            _gather(stored, np.uint64(out) + np.uint64(i) * np.uint64(out_stride), places[i], n_parts, n_tokens, token_bytes)
            if verify:
                checked[row] = 1


@kernel()
def row_ranges(rows, handles, shard_sizes, by_pread, shard_rows):
    """Where the stored bytes of `rows` of one array lie: uint64 [len(rows), 3], handle of the shard, offset in it, bytes.

    Arguments as for `copy_rows`. 0 bytes where a shard is not open, or its index has no row there or points outside.
    """
    ranges = np.zeros((len(rows), 3), np.uint64)
    words = np.zeros(2, np.uint64)
    at = np.uint64(words.ctypes.data)
    for i in range(len(rows)):
        shard, slot = rows[i] // shard_rows, rows[i] % shard_rows
        handle, shard_bytes = handles[shard], shard_sizes[shard]
        if handle == np.uint64(CLOSED):
            continue
        entry = shard_bytes - np.uint64(4) - np.uint64(16) * np.uint64(shard_rows - slot)
        if by_pread:
            if not _fill(at, np.uint64(16), handle, entry):
                continue
        else:
            memcpy(at, handle + entry, np.uint64(16))
        if words[0] <= shard_bytes and words[1] <= shard_bytes - words[0]:
            ranges[i, 0], ranges[i, 1], ranges[i, 2] = handle, words[0], words[1]
    return ranges


@kernel()
def advise(ranges, by_pread):
    """Tell the kernel that `ranges` (see `row_ranges`) will be read soon, so that it begins to; does not wait for it.

    Returns how many of them it refused.
    """
    page, n_refused = np.uint64(4095), 0
    for i in range(len(ranges)):
        handle, offset, n_bytes = ranges[i, 0], ranges[i, 1], ranges[i, 2]
        if n_bytes == 0:
            continue
        if by_pread:
            n_refused += fadvise(handle, offset, n_bytes, _WILLNEED) != 0
        else:
            start = (handle + offset) & ~page
            n_refused += madvise(start, handle + offset + n_bytes - start, _WILLNEED) != 0
    return n_refused


def use_threads(n_threads: int) -> None:
    """Let the parallel loops of this thread use `n_threads` (at most what the machine has)."""
    if IS_PARALLEL:
        numba.set_num_threads(max(1, min(n_threads, numba.config.NUMBA_NUM_THREADS)))
