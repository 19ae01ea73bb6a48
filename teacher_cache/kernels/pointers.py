"""Addresses in code that numba compiles: as typed pointers, and as what lies there.

Tables reach compiled code as addresses, because arrays that a function closes over are frozen into its machine code.
"""

from __future__ import annotations

import os

os.environ.setdefault("NUMBA_THREADING_LAYER", "threadsafe")  # tbb or omp: two live loaders abort under "workqueue"

from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402


@intrinsic
def load_u64(typingctx, address):
    """The little-endian 64-bit word at any address, aligned or not."""

    def codegen(context, builder, signature, arguments):
        i64 = ir.IntType(64)
        word = builder.load(builder.inttoptr(arguments[0], i64.as_pointer()))
        word.align = 1
        return word

    return types.uint64(types.uint64), codegen


@intrinsic
def load_u8(typingctx, address):
    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()))

    return types.uint8(types.uint64), codegen


@intrinsic
def exchange_u64(typingctx, address, value):
    """Store `value` in the aligned word at `address` and return what was there, as one step that no thread can divide."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")

    return types.uint64(types.uint64, types.uint64), codegen


def _pointer_to(kind):
    """A compiled function from an address to a pointer, for numba.carray."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.uint64), codegen

    return pointer


pointer_u8, pointer_u32 = _pointer_to(types.uint8), _pointer_to(types.uint32)
pointer_u64, pointer_i64 = _pointer_to(types.uint64), _pointer_to(types.int64)
pointer_i32 = _pointer_to(types.int32)


N_SLOTS = 3


@intrinsic
def slots(typingctx):
    """Address of N_SLOTS words of 64 bits that lie beside the machine code of the function that asks, zero at first: what a kept
    function has to know of its process, which is nothing that can stand in its code."""

    def codegen(context, builder, signature, arguments):
        kind = ir.ArrayType(ir.IntType(64), N_SLOTS)
        words = builder.module.globals.get("slots") or ir.GlobalVariable(builder.module, kind, "slots")
        words.linkage, words.initializer = "internal", ir.Constant(kind, None)
        return builder.ptrtoint(words, ir.IntType(64))

    return types.uint64(), codegen
