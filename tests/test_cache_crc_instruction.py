"""The instruction for CRC-32C: of what is compiled for, whatever machine compiles."""

from __future__ import annotations

import os
import subprocess
import sys

import google_crc32c
import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from teacher_cache.kernels.crc_instruction import INSTRUCTIONS

CODE = """
import numpy as np
from teacher_cache.kernels import loops
data = np.frombuffer(bytes(range(256)) * 5 + b"123456789", "u1")
for n in (0, 1, 7, 8, 9, len(data)):
    print(loops.crc32c_at(np.uint64(data.ctypes.data), np.uint64(n)))
out = np.zeros(200_000, "u1")
source = np.arange(200_000, dtype="u8").view("u1")[:200_000].copy()
loops.copy_bytes(np.uint64(out.ctypes.data), np.uint64(source.ctypes.data), np.uint64(len(out)), False)
print((out == source).all(), loops._INSTRUCTION is not None)
"""


def test_another_target_than_the_machine():
    """Compiled for a processor without the instruction, checksums and copies are the same: LLVM is not asked for what its target
    has not got."""
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, "NUMBA_CPU_NAME": "generic"}
    )
    assert run.returncode == 0, run.stderr
    data = bytes(range(256)) * 5 + b"123456789"
    *found, last = run.stdout.split("\n")[:-1]
    assert [int(crc) for crc in found] == [google_crc32c.value(data[:n]) for n in (0, 1, 7, 8, 9, len(data))]
    assert last == "True False"


@pytest.mark.parametrize(
    "machine, triple, mnemonic", [("x86_64", "x86_64-linux-gnu", "crc32q"), ("aarch64", "aarch64-linux-gnu", "crc32cx")]
)
def test_each_kind_of_processor_is_given_its_own(machine, triple, mnemonic):
    """For a target that has the feature, LLVM makes the one instruction of it; it is compiled here, not run."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    instruction, i64 = INSTRUCTIONS[machine], ir.IntType(64)
    module = ir.Module()
    builder = ir.IRBuilder(ir.Function(module, ir.FunctionType(i64, [i64, i64]), "step").append_basic_block())
    builder.ret(instruction.call(builder, *builder.function.args))
    target = llvm.Target.from_triple(triple).create_target_machine(features=f"+{instruction.feature}")
    assert mnemonic in target.emit_assembly(llvm.parse_assembly(str(module)))


def test_a_big_endian_machine_is_told():
    """On a machine of the other byte order nothing is read as if it were of this one."""
    code = "import sys; sys.byteorder = 'big'; import teacher_cache"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "works on little-endian machines only" in run.stderr
