"""verify against the sources: crops cut again are identical, targets made again agree, and what does not is told apart."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from cache_fakes import crop_folder
from click.testing import CliRunner
from fakes import FakeTeacher
from PIL import Image, ImageOps

from teacher_cache.checking import remake
from teacher_cache.checking.remake import limits, load_teacher_of, recrop, reteach
from teacher_cache.cli.main import main
from teacher_cache.crops.beton import CropReader
from teacher_cache.crops.cutting import encode
from teacher_cache.errors import MismatchError, UnknownNameError, UsageError
from teacher_cache.extraction import cropping
from teacher_cache.extraction.extract import ExtractPlan, extract_view
from teacher_cache.extraction.probe import PROBE_TOLERANCE, probe_image
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.teachers.base import TeacherOutput

ALL = np.arange(24)


def kinds(findings) -> list[tuple[str, str]]:
    return [(finding.kind, finding.message) for finding in findings]


# --- crops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_format", ["jpeg90", "raw"])
@pytest.mark.parametrize("plan", [CropPlan(size=32, jitter=0.4), CropPlan.center(32)], ids=["random", "center"])
def test_crops_are_cut_again(image_folder, tmp_path, plan, crop_format):
    """Cut again from the same originals, every crop has the same record and the same bytes."""
    cache = crop_folder(tmp_path / "c", image_folder, plan=plan, crop_format=crop_format)
    assert list(recrop(cache.view(0), image_folder, ALL)) == []


def test_changed_originals(shared_cache, image_folder, tmp_path):
    """An original that changed, even in a byte that no pixel depends on, or that is gone, is told; the cache is not to blame."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    names = shared_cache.images().names
    (images / names[3]).write_bytes((images / names[3]).read_bytes() + b"\0")
    (images / names[7]).unlink()
    (images / names[9]).write_bytes(b"")
    found = kinds(recrop(shared_cache.view(1), images, ALL))
    assert {kind for kind, _ in found} == {"unchecked"} and len(found) == 3
    told = "1 of 24 crops cut again: the original is not the file it was when the crop was cut, e.g. row 3, "
    assert found[0][1] == f"{told}{names[3]}."
    assert (
        "row 7" in found[1][1]
        and f"{images} has no such original" in found[1][1]
        and "row 9" in found[2][1]
        and "the original cannot be used" in found[2][1]
    )
    assert list(recrop(shared_cache.view(1), images, np.array([0, 1, 2]))) == []


def test_another_pillow(shared_cache, image_folder, monkeypatch):
    """Other bytes of the same picture are another Pillow's; another picture of the same original is a fault."""
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "encode", lambda image, crop_format: encode(image, "jpeg90"))
        found = kinds(recrop(shared_cache.view(0), image_folder, ALL))
    assert [kind for kind, _ in found] == ["unchecked"] and "makes other bytes of the same original here" in found[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "encode", lambda image, crop_format: encode(ImageOps.invert(image), crop_format))
        found = kinds(recrop(shared_cache.view(0), image_folder, ALL))
    assert [kind for kind, _ in found] == ["damaged"] and "24 of 24" in found[0][1] and "gives another picture" in found[0][1]


def test_another_reading_of_the_original(shared_cache, image_folder, monkeypatch):
    """A Pillow that reads other sizes, and a record with another box than the plan draws, are told apart."""
    with monkeypatch.context() as patch:
        patch.setattr(cropping, "load_image", lambda data, name: Image.new("RGB", (20, 30)))
        found = kinds(recrop(shared_cache.view(0), image_folder, ALL))
    assert [kind for kind, _ in found] == ["unchecked"] and "reads another height or width" in found[0][1]
    with monkeypatch.context() as patch:
        draw = cropping.draw
        patch.setattr(
            cropping, "draw", lambda plan, name, view, h, w: dataclasses.replace(draw(plan, name, view, h, w), top=0, left=0)
        )
        found = kinds(recrop(shared_cache.view(0), image_folder, ALL))
    assert [kind for kind, _ in found] == ["damaged"] and "another box, flip or jitter than the plan draws" in found[0][1]


# --- targets -----------------------------------------------------------------------------------------------------------


class Disturbed(FakeTeacher):
    """The fake teacher, whose answers to crops (not to the probe) are changed by `change`: tokens -> tokens."""

    def __init__(self, change, attention=None):
        super().__init__()
        self.change, self.change_attention = change, attention or (lambda attention: attention)

    def __call__(self, images_u8, layers) -> TeacherOutput:
        output = super().__call__(images_u8, layers)
        if np.array_equal(images_u8[0].numpy(), probe_image(32)):
            return output
        return TeacherOutput(self.change(output.tokens), self.change_attention(output.attention))


@pytest.mark.parametrize("name", ["fake", "fake16", "fake-zstd"])
def test_targets_are_made_again(shared_cache, teacher, name):
    """Made again by the same teacher, every row agrees within what storing does to it."""
    for view in shared_cache.views():
        assert list(reteach(view, view.store_path(name), teacher, ALL)) == []


def of(shared_cache, teacher, name="fake", rows=ALL):
    view = shared_cache.view(0)
    return [(f.path.split(".zarr/")[1], f.message) for f in reteach(view, view.store_path(name), teacher, rows)]


@pytest.mark.parametrize("name", ["fake", "fake16"])
def test_rows_of_other_crops_are_found(shared_cache, name):
    """Targets that belong to other rows are found in every layer and in the attention, with how far off they are."""
    found = of(shared_cache, Disturbed(lambda tokens: tokens.roll(1, 0), lambda attention: attention.roll(1, 0)), name)
    assert {array for array, _ in found} == {"attention", *(f"tokens/{layer:02d}" for layer in range(2, 7))}
    assert found[0][1].startswith("24 of 24 rows are not what fake gives again: the attention of row ")


def test_one_wrong_layer_row_or_token_is_found(shared_cache):
    """One layer, one row or one token that is wrong is found, and named; errors as large as storing makes them are not."""
    fidelity = shared_cache.view(0).store("fake").manifest.fidelity[2]
    typical, single = limits(fidelity, PROBE_TOLERANCE["fp32"])
    assert (typical, single) == (fidelity.p99 + 1e-3, 2 * fidelity.worst + 4e-3)

    def one_layer(tokens):
        tokens[:, 2] = tokens[:, 2].flip(-1)
        return tokens

    def one_token(tokens):
        tokens[4, 2, 9] = -tokens[4, 2, 9]
        return tokens

    found = of(shared_cache, Disturbed(one_layer), rows=ALL[:16])
    assert {array for array, _ in found} == {"tokens/04"} and all(text.startswith("16 of 16 rows") for _, text in found)
    found = of(shared_cache, Disturbed(one_token), rows=ALL[8:16])
    assert len(found) == 1 and found[0][0] == "tokens/04" and "a token of row 12 is off by " in found[0][1]
    assert of(shared_cache, Disturbed(lambda tokens: tokens * (1 + 5e-4))) == []


def test_another_software_or_decoder_is_not_compared(shared_cache, monkeypatch):
    """A teacher that answers otherwise to the probe, or pixels decoded otherwise, say nothing about the store: refused."""
    view = shared_cache.view(0)
    with pytest.raises(MismatchError, match="answers to the probe image"):
        list(reteach(view, view.store_path("fake"), FakeTeacher(seed=1), ALL))
    found = list(remake.teach_views_again(shared_cache, FakeTeacher(seed=1), "fake", 4))
    assert [finding.kind for finding in found] == ["unchecked", "unchecked"] and "answers to the probe" in found[0].message
    decoded = CropReader.decoded
    monkeypatch.setattr(CropReader, "decoded", lambda self: decoded(self) | {"crc32c": [0] * 24})
    with pytest.raises(MismatchError, match="decode to other pixels"):
        list(reteach(view, view.store_path("fake"), FakeTeacher(), ALL))


def test_unfinished_rows_are_left_out(cache, teacher):
    """Of an unfinished store the finished rows are compared."""
    extract_view(cache.view(0), "new", teacher, ExtractPlan(shard_rows=8), shards=range(1, 2))
    rows = np.array([3, 9, 20])
    assert list(reteach(cache.view(0), cache.view(0).store_path("new"), teacher, rows)) == []
    found = list(reteach(cache.view(0), cache.view(0).store_path("new"), Disturbed(lambda tokens: -tokens), rows))
    assert all(finding.message.startswith("1 of 1 rows") for finding in found) and found


# --- which teacher, and the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_cache(image_folder, tmp_path_factory):
    """A cache of the demo teacher, last layer."""
    cache = crop_folder(tmp_path_factory.mktemp("demo") / "c", image_folder)
    arguments = ["extract", "--teacher", "demo", "--layers", "last", "--device", "cpu", str(cache.path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    return cache


def test_which_teacher(demo_cache, shared_cache, tmp_path):
    """The store names its teacher and weights: others, or a choice that is not clear, are refused with a sentence."""
    name, teacher = load_teacher_of(demo_cache, "built-in")
    assert name == "demo" and teacher.spec == demo_cache.view(0).store("demo").teacher
    own = teacher.spec.weights_sha256
    with pytest.raises(
        UsageError, match=rf"--weights random:0: .*/demo.zarr was made with the weights built-in, sha256 {own}; those"
    ):
        load_teacher_of(demo_cache, "random:0", "demo")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="--weights"):
        load_teacher_of(demo_cache, str(tmp_path / "weights.pt"))
    with pytest.raises(UsageError, match=r"has 3 stores \(fake, fake-zstd, fake16\). Give one as --teacher"):
        load_teacher_of(shared_cache, "random:0")
    with pytest.raises(UnknownNameError, match="has no store clip-b16; it has fake, fake-zstd, fake16"):
        load_teacher_of(shared_cache, "random:0", "clip-b16")


def test_command(demo_cache, image_folder, tmp_path):
    """verify --images --weights: 0 if all agrees, 2 if something could not be compared, 1 if the cache is at fault."""

    def run(*arguments):
        result = CliRunner().invoke(main, ["verify", "--json", *map(str, arguments), str(demo_cache.path)])
        return result.exit_code, json.loads(result.stdout).get("findings", result.stderr)

    assert run("--images", image_folder, "--weights", "built-in", "--teacher", "demo", "--sample", 10) == (0, [])
    code, message = run("--weights", "random:0")
    assert code == 2 and message.startswith("Error: --weights random:0: ")
    images = shutil.copytree(image_folder, tmp_path / "images")
    for image in images.glob("*/*"):
        image.write_bytes(image.read_bytes() + b"\0")
    code, found = run("--images", images)
    assert code == 2 and [finding["kind"] for finding in found] == ["unchecked"] and "24 of 24 crops" in found[0]["message"]
    (demo_cache.path / "notes.txt").touch()
    assert run("--images", images)[0] == 1
    (demo_cache.path / "notes.txt").unlink()
