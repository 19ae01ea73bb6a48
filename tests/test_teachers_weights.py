"""What `--weights` may be: a file that fits exactly, or random:SEED; all else is an error that says what to do."""

import re

import pytest
import torch
from safetensors.torch import save_file

from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.timm_vit import build_vit
from teacher_cache.teachers.weights.load import random_weights, sha256_tensors


@pytest.fixture
def state():
    model = build_vit(TEACHERS["demo"])
    random_weights(model, 0)
    return model.state_dict()


@pytest.mark.parametrize(
    "weights", ["random:x", "random:", "random:-1", "random:1.5", f"random:{2**63}", "random:" + "9" * 5000, "random:²"]
)
def test_a_seed_is_a_whole_number(weights):
    """`random:` with anything but a whole number is a UsageError that shows the right form."""
    with pytest.raises(UsageError, match=re.escape(f"--weights {weights}: ") + ".*random:0"):
        load_teacher("demo", weights)


def test_values_that_are_no_float_tensors_or_not_finite_are_named(state, tmp_path):
    """Integers, strings and NaN under the right names do not get in."""
    path = tmp_path / "weights.pt"
    torch.save({**state, "norm.bias": torch.zeros(64, dtype=torch.int64), "norm.weight": "gone"}, path)
    with pytest.raises(BadInputError, match=r"2 not floating point \(norm.bias, norm.weight\)"):
        load_teacher("demo", path)
    torch.save({**state, "norm.bias": torch.full((64,), float("nan"))}, path)
    with pytest.raises(BadInputError, match=r"1 with NaN or infinite values \(norm.bias\)"):
        load_teacher("demo", path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_float_kind_are_computed_in_float32(dtype, state, tmp_path):
    """Files in other float kinds load, rounded to what they hold, as float32."""
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "weights")
    teacher = load_teacher("demo", tmp_path / "weights")
    for name, tensor in teacher._anatomy.model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].to(dtype).float())


def test_random_weights_depend_on_the_seed_alone():
    """The same seed gives the same tensors whatever the global state, which stays as it was; another seed others."""
    torch.manual_seed(1)
    first = load_teacher("demo", "random:4")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    model = build_vit(TEACHERS["demo"])
    torch.set_rng_state(before)
    random_weights(model, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert sha256_tensors(model.state_dict()) == first.spec.weights_sha256
    assert load_teacher("demo", "random:5").spec.weights_sha256 != first.spec.weights_sha256
    assert first.spec.weights == "random:4"


def test_random_weights_are_the_same_numbers_tomorrow():
    """The hash of demo's random:0 is fixed: a change of it makes every cache of a trial another teacher's."""
    sha256 = load_teacher("demo", "random:0").spec.weights_sha256
    assert sha256 == "daa3120dddc00509e482935d882a14a544446be53bbd881593afc8e3dfede37f"


def test_the_hash_of_tensors_sees_names_shapes_and_bytes():
    """A renamed, reshaped or changed tensor changes the hash; the order of a dictionary does not."""
    a, b = torch.arange(6.0), torch.ones(2)
    base = sha256_tensors({"a": a, "b": b})
    assert base == sha256_tensors({"b": b, "a": a})
    others = [{"a": a, "c": b}, {"a": a.view(2, 3), "b": b}, {"a": a + 1, "b": b}, {"a": a.double(), "b": b}]
    assert len({base, *map(sha256_tensors, others)}) == 5


@pytest.mark.parametrize("name", ["demo", "timm:test_vit"])
def test_random_features_are_not_degenerate(name):
    """On random weights tokens differ between places and images, and attention is not flat: trials mean something."""
    teacher = load_teacher(name, "random:0")
    side = teacher.spec.image_size
    images = torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = teacher(images, [teacher.spec.depth])
    patches = output.tokens[:, 0, 1:]
    assert patches.std(1).mean() > 0.3 and patches.std(0).mean() > 0.3  # whitened tokens have spread 1 in all
    assert (output.attention.std(1) / output.attention.mean(1)).min() > 0.15
