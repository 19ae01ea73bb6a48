"""The processor's instruction for CRC-32C, if what numba compiles for has one.

Asked is the target of the compilation, not the machine: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES make code for another processor
of the family, and LLVM ends the process over an instruction that its target has not got.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numba
from llvmlite import ir
from numba.core.codegen import get_host_cpu_features


@dataclass(frozen=True)
class CrcInstruction:
    """Takes the CRC-32C of 8 more bytes."""

    intrinsic: str
    """LLVM's name."""
    crc_bits: int
    """Of the checksum that goes in and comes out."""
    feature: str
    """What a target that has it is said to have."""

    def call(self, builder: ir.IRBuilder, crc: ir.Value, word: ir.Value) -> ir.Value:
        """The code for one step: i64, i64 -> i64, of which the low 32 bits count."""
        i64, of_crc = ir.IntType(64), ir.IntType(self.crc_bits)
        function = builder.module.declare_intrinsic(self.intrinsic, fnty=ir.FunctionType(of_crc, [of_crc, i64]))
        if self.crc_bits == 64:
            return builder.call(function, [crc, word])
        return builder.zext(builder.call(function, [builder.trunc(crc, of_crc), word]), i64)


INSTRUCTIONS = {
    "x86_64": CrcInstruction("llvm.x86.sse42.crc32.64.64", 64, "crc32"),
    "aarch64": CrcInstruction("llvm.aarch64.crc32cx", 32, "crc"),
}
"""Of each kind of processor."""


def target_features() -> set[str]:
    """What numba's target has, in LLVM's words."""
    chosen = numba.config.CPU_FEATURES  # from the environment; empty for NUMBA_CPU_NAME=generic
    text = get_host_cpu_features() if chosen is None else chosen
    return {feature[1:] for feature in text.split(",") if feature.startswith("+")}


def crc_instruction() -> CrcInstruction | None:
    """That of numba's target, or None where it has none that is known here."""
    known = INSTRUCTIONS.get({"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()))
    return known if known and known.feature in target_features() else None
