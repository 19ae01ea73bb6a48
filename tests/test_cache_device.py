"""Which processors have bfloat16, and what `auto` means."""

from __future__ import annotations

import pytest

from teacher_cache import device


@pytest.mark.parametrize(
    ("line", "instruction"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "avx512_bf16"),
        ("Features\t: fp asimd sve bf16 i8mm", "bf16"),
        ("flags\t\t: fpu avx avx2\nmodel name\t: bf16 avx512_bf16", None),
    ],
)
def test_which_processors_have_bf16(line, instruction, tmp_path, monkeypatch):
    """By what Linux says of the processor, on x86 and on Arm."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "cpuinfo")
    assert device.cpu_bf16.__wrapped__() == instruction


def test_auto_is_float32_on_every_cpu(monkeypatch):
    """A store must not depend on which processor made it, unless somebody asked for that."""
    monkeypatch.setattr(device, "cpu_bf16", lambda: "amx_bf16")
    assert device.pick_device("cpu", "auto") == ("cpu", "fp32") and device.pick_device("cpu", "bf16") == ("cpu", "bf16")
