"""A weights file may be wrapped as people have them; which part of it is the teacher is clear, or asked for as FILE#KEY."""

import re

import pytest
import torch
from safetensors.torch import save_file
from teacher_fakes import dino_full_file, noise, prefixed, save, timm_vit

from teacher_cache.errors import BadInputError, UsageError
from teacher_cache.teachers import TEACHERS, load_teacher
from teacher_cache.teachers.timm_vit import build_vit
from teacher_cache.teachers.weights.load import load_weights, random_weights, sha256_tensors
from teacher_cache.teachers.weights.parts import Layout, split_key


@pytest.fixture(scope="module")
def state():
    return state_of(0)


@pytest.fixture(scope="module")
def other():
    return state_of(1)


def state_of(seed: int) -> dict[str, torch.Tensor]:
    model = build_vit(TEACHERS["demo"])
    random_weights(model, seed)
    return model.state_dict()


def loaded_state(path, name="demo"):
    return load_teacher(name, path)._anatomy.model.state_dict()


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


WRAPPED = {
    "model": lambda s: {"model": s, "epoch": 3},
    "DDP": lambda s: {"state_dict": prefixed("module.", s)},
    "compiled": lambda s: {"state_dict": prefixed("_orig_mod.", s)},
    "DDP of compiled": lambda s: prefixed("module._orig_mod.", s),
    "compiled DDP": lambda s: {"model": prefixed("_orig_mod.module.", s)},
    "compiled blocks": lambda s: {re.sub(r"^(blocks\.\d+\.)", r"\1_orig_mod.", name): t for name, t in s.items()},
    "average alone": lambda s: {
        "model_ema": prefixed("module.", s) | {"n_averaged": torch.tensor(7)},
        "optimizer": {"state": {}},
    },
    "timm's average alone": lambda s: {"state_dict_ema": s},
    "teacher's backbone": lambda s: {"teacher": prefixed("backbone.", s) | noise("head.weight")},
    "two deep": lambda s: {"checkpoint": {"teacher": prefixed("encoder.", s)}, "step": torch.tensor(1)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_one_set_of_weights_is_found_in_any_wrapper(wrap, state, tmp_path):
    """Inner dictionaries and one prefix do not change what is loaded, nor that the file's SHA-256 is on record."""
    teacher = load_teacher("demo", save(wrap(state), tmp_path / "a.pth"))
    assert same(teacher._anatomy.model.state_dict(), state)
    assert teacher.spec.weights == "a.pth"


@pytest.mark.parametrize("pair", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", "teacher")], ids=str)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_published_place_goes_first(pair, prefix, state, other, tmp_path):
    """Beside an average, the weights are those under `state_dict` or `model`, also behind a prefix, as they always were."""
    path = save({pair[0]: prefixed(prefix, state), pair[1]: prefixed(prefix, other)}, tmp_path / "a.pth")
    model = build_vit(TEACHERS["demo"])
    load_weights(model, path, [Layout(inside=("state_dict", "model"))])
    assert same(model.state_dict(), state)


def test_a_student_does_not_stand_in_for_a_teacher_that_does_not_fit(tmp_path):
    """A DINO checkpoint whose teacher lacks a name is refused by that name, although its student would fit."""
    made = dino_full_file(timm_vit(TEACHERS["dino-s16"]))
    del made["teacher"]["backbone.norm.bias"]
    with pytest.raises(BadInputError, match=r"1 missing \(backbone.norm.bias\)"):
        load_teacher("dino-s16", save(made, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: {"student": a, "teacher": b},
        lambda a, b: {"model": prefixed("student.", a) | prefixed("teacher.", b)},
        lambda a, b: prefixed("student.", a) | prefixed("teacher.", b) | noise("loss.centre"),
    ],
    ids=["dictionaries", "prefixes within", "prefixes"],
)
def test_of_several_that_fit_none_is_guessed_and_a_key_picks_one(make, state, other, tmp_path):
    """Two sets of weights are an error that prints both commands; each of them loads its own, with its own identity on record."""
    path = save(make(state, other), tmp_path / "a.pth")
    with pytest.raises((UsageError, BadInputError), match="--weights [^ ]*#") as caught:
        load_teacher("demo", path)
    keys = re.findall(rf"--weights {re.escape(str(path))}#([\w.]+[\w])", str(caught.value))
    assert [key.removeprefix("model.") for key in keys] == ["student", "teacher"]
    teachers = [load_teacher("demo", f"{path}#{key}") for key in keys]
    for teacher, key, expected in zip(teachers, keys, (state, other), strict=True):
        assert same(teacher._anatomy.model.state_dict(), expected)
        assert (teacher.spec.weights, teacher.spec.weights_sha256) == (f"a.pth#{key}", sha256_tensors(expected))


def test_equal_copies_are_no_choice(state, tmp_path):
    """A student and a teacher with the same numbers are one set of weights."""
    copy = {name: tensor.clone() for name, tensor in state.items()}
    assert same(loaded_state(save({"student": state, "teacher": copy}, tmp_path / "a.pth")), state)


def test_a_needless_key_is_the_same_teacher(state, other, tmp_path):
    """A key that says what the file alone would give keeps the file's SHA-256, so that stores made either way go on."""
    path = save({"average": state, "epoch": 3}, tmp_path / "a.pth")
    alone, keyed = load_teacher("demo", path), load_teacher("demo", f"{path}#average")
    assert alone.spec.weights_sha256 == keyed.spec.weights_sha256 and keyed.spec.weights == "a.pth#average"


def test_a_key_that_is_not_there_lists_those_that_are(state, other, tmp_path):
    """A mistyped or empty key is an error with the parts of the file."""
    path = save({"student": state, "teacher": other}, tmp_path / "a.pth")
    for key in ("teecher", "", "teacher.x"):
        with pytest.raises(UsageError, match=f"no part '{key}' that holds tensors. It has: .*student.*teacher"):
            load_teacher("demo", f"{path}#{key}")


def test_a_file_with_a_hash_in_its_name_is_that_file(state, tmp_path):
    """`#` in a real file's or folder's name does not begin a key."""
    (tmp_path / "run#3").mkdir()
    path = save(state, tmp_path / "run#3" / "best#model.pth")
    assert split_key(str(path)) == (path, None) and split_key(f"{path}#a.b") == (path, "a.b")
    assert load_teacher("demo", path).spec.weights == "best#model.pth"


def test_dinov2s_mask_token_and_heads_are_left_out(tmp_path):
    """Meta's files load under timm's name with what they have beside the ViT; another name nobody knows does not."""
    state = load_teacher("timm:test_vit", "random:0")._anatomy.model.state_dict()
    extra = noise("mask_token", "dino_head.last_layer.weight_g", "ibot_head.mlp.0.weight")
    assert same(loaded_state(save(state | noise("mask_token"), tmp_path / "a.pth"), "timm:test_vit"), state)
    path = save({"teacher": prefixed("backbone.", state) | extra}, tmp_path / "b.pth")
    assert len(load_teacher("timm:test_vit", path).ignored_weights) == 3
    path = save(state | noise("mask_token", "adapter.weight"), tmp_path / "c.pth")
    with pytest.raises(BadInputError, match=r"1 unexpected \(adapter.weight\)"):
        load_teacher("timm:test_vit", path)


def test_the_layout_of_transformers_is_named(tmp_path):
    """A file of Hugging Face's transformers is said to be one, with the names that are read and a command that makes them."""
    names = ["embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight", "layernorm.weight"]
    save_file(noise(*names), tmp_path / "hf.safetensors")
    with pytest.raises(BadInputError, match="layout of Hugging Face's transformers .*blocks.0.*create_model.'test_vit'"):
        load_teacher("timm:test_vit", tmp_path / "hf.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_that_were_half_are_said_to_be(dtype, state, tmp_path):
    """A copy in half precision loads, and says so; one whose numbers float16 could not hold is refused with the reason."""
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    teacher = load_teacher("demo", save({"model_ema": half}, tmp_path / "a.pth"))
    assert teacher.weights_read == f"from model_ema, stored as {str(dtype).removeprefix('torch.')}"
    half["norm.bias"] = torch.full((64,), 1e6).to(dtype)
    if dtype == torch.float16:
        with pytest.raises(BadInputError, match="1 with NaN or infinite values .norm.bias.*float16 ends"):
            load_teacher("demo", save(half, tmp_path / "b.pth"))


def test_a_dictionary_that_holds_itself_is_read(state, tmp_path):
    """A pickle may hold a cycle; it does not keep the search going."""
    made = {"average": state}
    made |= {f"self {i}": made for i in range(40)}
    assert same(loaded_state(save(made, tmp_path / "a.pth")), state)
