"""A teacher's float32 is float32, and what the process has set is as it was afterwards."""

import warnings

import pytest
import torch
from teacher_fakes import crops_u8
from torch import backends

from teacher_cache.teachers import load_teacher
from teacher_cache.teachers.float32 import full_float32

SETTINGS = {
    "as torch starts": "",
    "older: all": "backends.cuda.matmul.allow_tf32 = True; backends.cudnn.allow_tf32 = True",
    "older: none": "backends.cudnn.allow_tf32 = False",
    "older: by name": "torch.set_float32_matmul_precision('medium')",
    "newer: one operation": "backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer: all": "backends.fp32_precision = 'tf32'",
    "newer: off": "backends.fp32_precision = 'ieee'",
    "both": "torch.set_float32_matmul_precision('high'); backends.cudnn.conv.fp32_precision = 'tf32'",
}
OPERATIONS = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
READ = {
    "matmul, older": lambda: backends.cuda.matmul.allow_tf32,
    "cudnn, older": lambda: backends.cudnn.allow_tf32,
    "by name": torch.get_float32_matmul_precision,
    **{f"newer {i}": lambda operation=operation: operation.fp32_precision for i, operation in enumerate(OPERATIONS)},
    **{f"followed {i}": lambda owner=owner: owner.fp32_precision for i, owner in enumerate((backends, backends.cudnn))},
}


def settings() -> dict[str, str]:
    """All of them as they read; where older and newer ones were mixed, reading some is an error of torch's own."""
    found = {}
    for name, read in READ.items():
        try:
            found[name] = str(read())
        except RuntimeError:
            found[name] = "mixed"
    return found


@pytest.fixture
def forgotten():
    """Puts back what the process had."""
    yield
    for operation in (backends, backends.cudnn, backends.cudnn.rnn, backends.mkldnn, *OPERATIONS):
        operation.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_tf32_is_off_inside_and_as_it_was_afterwards(setting, forgotten):
    """However the process was set, by either of torch's two ways, operations are exact inside, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(setting)
        before = settings()
        with pytest.raises(ZeroDivisionError), full_float32():
            assert [operation.fp32_precision for operation in OPERATIONS] == ["ieee"] * 4
            raise ZeroDivisionError
        assert settings() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_runs_so_in_fp32_alone(precision, forgotten):
    """The blocks of a teacher in fp32 see TF32 off although the process wants it; in bf16 they are left alone."""
    teacher = load_teacher("demo")
    teacher.precision = precision
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
    seen = []
    teacher._anatomy.model.patch_embed.register_forward_hook(
        lambda *_: seen.extend(operation.fp32_precision for operation in OPERATIONS[:2])
    )
    teacher(crops_u8(1, 32), [6])
    assert seen == ["ieee" if precision == "fp32" else "tf32"] * 2
    assert backends.cudnn.conv.fp32_precision == "tf32"
