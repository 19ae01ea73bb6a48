"""Functions of libc and of FFCV's library, as compiled code calls them: by name, for code that is kept can hold no address."""

from __future__ import annotations

import ctypes

from llvmlite import binding
from numba import types

from .decoder import library

_I32, _U32, _I64, _U64 = types.int32, types.uint32, types.int64, types.uint64

memcpy = types.ExternalFunction("memcpy", _U64(_U64, _U64, _U64))
pread = types.ExternalFunction("pread", _I64(_I32, _U64, _U64, _I64))
madvise = types.ExternalFunction("madvise", _I32(_U64, _U64, _I32))
write = types.ExternalFunction("write", _I64(_I32, _U64, _U64))
leave = types.ExternalFunction("_exit", types.void(_I32))
pause = types.ExternalFunction("pause", _I32())
throw = types.ExternalFunction("raise", _I32(_I32))
sigaction = types.ExternalFunction("sigaction", _I32(_I32, _U64, _U64))
fadvise = types.ExternalFunction("posix_fadvise", _I32(_I32, _I64, _I64, _I32))

binding.add_symbol("ffcv_imdecode", ctypes.cast(library.imdecode, ctypes.c_void_p).value)
imdecode = types.ExternalFunction("ffcv_imdecode", _I32(_U64, _U64, _U32, _U32, _U64, *[_U32] * 8))
"""source, its bytes, height, width, target, height and width of the cut, its offset, scale, and whether to cut and to mirror."""
