"""A batch of the loader: crops decoded, targets copied. Everything is found through one table of addresses, counts and flags, so
that one machine code serves every view and every store.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from .compiled import kernel
from .loops import copy_rows, copy_tokens, decode_rows
from .pointers import pointer_i32, pointer_i64, pointer_u8, pointer_u32, pointer_u64

# Columns of the tables, all uint64: of the crops, and of each field of a record.
BASE, POINTERS, SIZES, CRCS, N_CROPS, IS_JPEG, CROP_ERRORS, N_CROP_COLUMNS = range(8)
(HANDLES, SHARD_SIZES, N_SHARDS, BY_PREAD, SHARD_ROWS, CHECKED, CHECK, OFFSET, FIELD_ERRORS, PLACES, ROW_BYTES, N_ROWS, N_CHOSEN,
 N_PARTS, N_TOKENS, TOKEN_BYTES, N_FIELD_COLUMNS) = range(17)  # fmt: skip


@kernel()
def decode_batch(rows, out, table):
    """Decode the crops `rows` into `out`, uint8 [B, size, size, 3]; `table`: address of N_CROP_COLUMNS words."""
    control = carray(pointer_u64(np.uint64(table)), N_CROP_COLUMNS)
    n_crops = control[N_CROPS]
    pointers = carray(pointer_u64(control[POINTERS]), n_crops)
    sizes = carray(pointer_u64(control[SIZES]), n_crops)
    crcs = carray(pointer_u32(control[CRCS]), n_crops)
    errors = carray(pointer_i64(control[CROP_ERRORS]), len(rows))
    decode_rows(rows, out, control[BASE], pointers, sizes, crcs, control[IS_JPEG] == 1, errors)


@kernel()
def fetch_batch(rows, out, record_bytes, table, n_fields):
    """Copy the records of `rows` to the address `out`; `table`: address of `n_fields` lines of N_FIELD_COLUMNS words."""
    control = carray(pointer_u64(np.uint64(table)), (n_fields, N_FIELD_COLUMNS))
    for i in range(n_fields):
        line = control[i]
        handles = carray(pointer_u64(line[HANDLES]), line[N_SHARDS])
        sizes = carray(pointer_u64(line[SHARD_SIZES]), line[N_SHARDS])
        checked = carray(pointer_u8(line[CHECKED]), line[N_ROWS])
        errors = carray(pointer_i64(line[FIELD_ERRORS]), len(rows))
        start = np.uint64(out) + line[OFFSET]
        by_pread, shard_rows, check = line[BY_PREAD] == 1, np.int64(line[SHARD_ROWS]), np.int64(line[CHECK])
        if line[N_CHOSEN] == 0:
            copy_rows(rows, start, record_bytes, handles, sizes, by_pread, shard_rows, line[ROW_BYTES], checked, check, errors)
        else:
            places = carray(pointer_i32(line[PLACES]), (len(rows), np.int64(line[N_CHOSEN])))
            copy_tokens(rows, places, line[N_PARTS], line[N_TOKENS], line[TOKEN_BYTES], start, record_bytes, handles, sizes,
                        by_pread, shard_rows, checked, check, errors)  # fmt: skip
