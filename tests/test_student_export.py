"""Encoders in the layouts of other libraries: every format is loaded by its own reader, and gives the same features."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from student_fakes import TEACHER, tiny_config
from timm.models.vision_transformer import VisionTransformer

from student import AlignConfig, ConfigError, ContrastConfig, MCMAEConfig, RunError, Student, SwinConfig, ViTConfig
from student.cli.evaluate import evaluate
from student.cli.export import _teacher_lines, export
from student.exports.layouts import exported, from_hf, from_mcmae, ours
from student.exports.reading import load_exported
from student.exports.timm_names import MODELS, timm_name
from student.exports.weight_files import read_weights
from student.files.checkpoint import load_backbone, save_checkpoint
from student.modules.average import WeightAverage
from student.modules.backbones import build_backbone
from student.modules.pixels import PIXELS
from student.run.optim import build_optimizer

VIT = ViTConfig(image_size=16, patch_size=4, dim=32, depth=3, heads=4, drop_path=0.2, layer_scale=0.1, fuse_blocks=(1, 3),
                positions="moco")  # fmt: skip
MASK_TOKEN = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2, hidden="mask-token")
SWIN = SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=(1, 2), heads=(1, 2), window=4)
MCMAE = MCMAEConfig(image_size=16, strides=(2, 2, 1), dims=(8, 12, 16), depths=(1, 2, 2), heads=2)
IDENTITY = {"crops_id": "c" * 64, "views": ["v" * 64], "teachers": [{"store": "fake", "weights_sha256": "d" * 64}]}


def a_run(folder: Path, backbone, ema: float | None = None) -> Path:
    """A run whose every weight has moved from where it began, the average by another way."""
    config = tiny_config(backbone=backbone, teachers=("fake",))
    if backbone.hidden == "mask-token":
        config = replace(config, objectives=(ContrastConfig(hidden_dim=8, out_dim=4, queue=8),))
    config = replace(config, optim=replace(config.optim, ema=ema))
    student = Student(config, (replace(TEACHER, grid=backbone.grid, has_cls=backbone.has_cls, dim=backbone.dim),))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    average = WeightAverage(student, ema) if ema else None
    for tensor in (average.tensors if average else {}).values():
        tensor *= 0.5
    folder.mkdir()
    save_checkpoint(folder, 10, student, build_optimizer(student, config.optim), config, IDENTITY, average, pixels=PIXELS)
    return folder


def images_of(backbone) -> torch.Tensor:
    return torch.randn(2, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(2))


def features_of(run: Path, images: torch.Tensor, averaged: bool = False) -> torch.Tensor:
    backbone, _ = load_backbone(run / "checkpoint-00000010.safetensors", averaged)
    with torch.no_grad():
        return backbone.encode_all(images)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def write(run: Path, out: Path, layout: str, *more: str) -> dict:
    result = CliRunner().invoke(export, [str(run), "-o", str(out), "--format", layout, "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(export, list(arguments))
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("backbone", [VIT, MASK_TOKEN, SWIN], ids=["vit", "mask-token", "swin"])
def test_timm_loads_an_export(tmp_path, backbone):
    """timm.create_model takes the file by the name and arguments on record: no key missing, none left, the same features."""
    run, out = a_run(tmp_path / "run", backbone), tmp_path / "student.safetensors"
    named = write(run, out, "timm")["record"]["timm"]
    model = timm.create_model(named["name"], checkpoint_path=str(out), num_classes=0, **named["kwargs"]).eval()

    result = timm.create_model(named["name"], num_classes=0, **named["kwargs"]).load_state_dict(
        timm.models.load_state_dict(str(out)), strict=False
    )
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    with torch.no_grad():
        tokens = model.forward_features(images_of(backbone))
    assert_equal(tokens.flatten(1, -2), features_of(run, images_of(backbone)))


def test_another_number_of_heads_would_load_in_silence(tmp_path):
    """Why the number of heads is written down: no shape tells it."""
    run, out = a_run(tmp_path / "run", VIT), tmp_path / "student.safetensors"
    named = write(run, out, "timm")["record"]["timm"]
    model = timm.create_model(named["name"], checkpoint_path=str(out), num_classes=0, **named["kwargs"] | {"num_heads": 2}).eval()
    with torch.no_grad():
        found = model.forward_features(images_of(VIT))
    assert not torch.allclose(found, features_of(run, images_of(VIT)), rtol=1e-2)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, models in MODELS.items() for name in models])
def test_arguments_of_timms_names(monkeypatch, kind, name):
    """What timm itself passes on for a name is what the table says; the rest is timm's default for all."""
    module = importlib.import_module(f"timm.models.{'vision_transformer' if kind is ViTConfig else 'swin_transformer'}")
    passed = {}
    monkeypatch.setattr(module, f"_create_{module.__name__.split('.')[-1]}", lambda *names, **given: passed.update(given))
    getattr(module, name)()
    assert passed.pop("pretrained") is False
    default = {"img_size": 224, "mlp_ratio": 4.0} | ({"init_values": None} if kind is ViTConfig else {})
    assert default | passed == MODELS[kind][name]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_names_of_timm_stand_for_what_they_are_said_to(name):
    """A model of these sizes has this name and needs no argument; its weights have the shapes, its blocks the heads of timm's."""
    kind, arguments = next((kind, models[name]) for kind, models in MODELS.items() if name in models)
    same = {"image_size": arguments["img_size"], "patch_size": arguments["patch_size"], "heads": arguments["num_heads"]}
    if kind is ViTConfig:
        config = ViTConfig(dim=arguments["embed_dim"], depth=arguments["depth"], **same)
    else:
        config = SwinConfig(embed_dim=arguments["embed_dim"], depths=arguments["depths"], **same)
    assert timm_name(config) == (name, {})
    with torch.device("meta"):
        theirs, here = timm.create_model(name, num_classes=0), build_backbone(config)
    shapes = {key: value.shape for key, value in here.state_dict().items() if key != "mask_token"}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    heads = [[m.num_heads for m in model.modules() if hasattr(m, "num_heads")] for model in (theirs, here)]
    assert heads[0] == heads[1]
    eps = [[m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)] for model in (theirs, here)]
    assert eps[0] == eps[1]


def test_heads_of_another_number_are_said():
    """A ViT-S of MoCo v3 has 12 heads, and timm's name has 6."""
    assert timm_name(ViTConfig(dim=384, heads=12)) == ("vit_small_patch16_224", {"num_heads": 12})


def test_the_average_is_another_encoder(tmp_path):
    """--averaged takes the moving average of the weights."""
    run, out = a_run(tmp_path / "run", VIT, ema=0.9), tmp_path / "student.safetensors"
    write(run, out, "timm", "--averaged")
    with torch.no_grad():
        tokens = load_exported(out)[0].encode_all(images_of(VIT))
    assert_equal(tokens, features_of(run, images_of(VIT), averaged=True))
    assert not torch.allclose(tokens, features_of(run, images_of(VIT)), rtol=1e-2)
    other, place = a_run(tmp_path / "b", VIT), tmp_path / "b.safetensors"
    assert "no average" in refused(str(other), "-o", str(place), "--format", "timm", "--averaged")


def test_mae_fine_tunes_an_export(tmp_path):
    """As main_finetune.py loads it: of a ViT with CLS all but the head is there; of one that pools, all but head and fc_norm."""
    run, out = a_run(tmp_path / "run", VIT), tmp_path / "student.pth"
    write(run, out, "torch")
    weights = torch.load(out, map_location="cpu", weights_only=True)["model"]
    assert not [name for name in weights if ".ls" in name]
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7)

    with_cls = VisionTransformer(**sizes).eval()
    result = with_cls.load_state_dict(weights, strict=False)
    assert (set(result.missing_keys), result.unexpected_keys) == ({"head.weight", "head.bias"}, [])
    with torch.no_grad():
        assert_equal(with_cls.forward_features(images_of(VIT)), features_of(run, images_of(VIT)))

    pooled = VisionTransformer(**sizes, global_pool="avg", fc_norm=True).load_state_dict(weights, strict=False)
    assert set(pooled.missing_keys) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def test_transformers_loads_an_export(tmp_path):
    """ViTModel.from_pretrained finds every weight in the folder, and leaves none; the processor has the pixels' statistics."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")
    run, out = a_run(tmp_path / "run", VIT), tmp_path / "student-hf"
    write(run, out, "hf")
    model, found = transformers.ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    with torch.no_grad():
        tokens = model.eval()(pixel_values=images_of(VIT)).last_hidden_state
    assert_equal(tokens, features_of(run, images_of(VIT)))
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert (list(processor.image_mean), list(processor.image_std)) == (PIXELS["mean"], PIXELS["std"])


MCMAE_NAMES = """cls_token pos_embed norm.weight patch_embed1.proj.weight patch_embed3.norm.bias patch_embed4.weight
blocks1.0.norm1.weight blocks1.0.conv1.weight blocks1.0.attn.weight blocks2.1.conv2.bias blocks2.1.mlp.fc1.weight
blocks3.1.attn.qkv.weight blocks3.0.mlp.fc2.bias"""
"""Of models_convmae.py."""


def test_names_of_mcmae(tmp_path):
    """An encoder of MCMAE goes out under the names of its authors' code, its position table without a row for CLS."""
    run, out = a_run(tmp_path / "run", MCMAE), tmp_path / "student.pth"
    write(run, out, "torch")
    weights = torch.load(out, weights_only=True)["model"]
    assert set(MCMAE_NAMES.split()) <= set(weights)
    assert not [name for name in weights if name.startswith(("fuse", "stages", "embeds", "project", "blocks."))]
    assert weights["pos_embed"].shape == (1, MCMAE.n_patches, MCMAE.dim)
    assert from_mcmae({"stage1_output_decode.weight": torch.zeros(1)}).keys() == {"fuse.0.weight"}


CASES = [(VIT, "timm"), (VIT, "hf"), (VIT, "torch"), (MASK_TOKEN, "hf"), (SWIN, "timm"), (MCMAE, "torch")]


def place(folder: Path, layout: str) -> Path:
    return folder / {"timm": "s.safetensors", "hf": "s", "torch": "s.pth"}[layout]


@pytest.mark.parametrize(("backbone", "layout"), CASES, ids=lambda value: getattr(value, "kind", value))
def test_an_export_is_read_without_its_run(tmp_path, backbone, layout):
    """load_exported needs the file alone, and gives the features of the run; a second export has the same bytes."""
    run, out, again = a_run(tmp_path / "run", backbone), place(tmp_path, layout), tmp_path / "again"
    again.mkdir()
    write(run, out, layout)
    write(run, place(again, layout), layout)
    for path in [out, *out.rglob("*")] if layout == "hf" else [out]:
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(tmp_path)).read_bytes()

    expected = features_of(run, images_of(backbone))
    (run / "checkpoint-00000010.safetensors").unlink()
    found, record = load_exported(out)
    with torch.no_grad():
        assert_equal(found.encode_all(images_of(backbone)), expected)
    assert (record.pixels, record.config.image_size, found.has_cls) == (PIXELS, backbone.image_size, backbone.has_cls)
    assert record.config.heads == backbone.heads and record.made_from["data"] == IDENTITY


def test_names_of_transformers_come_back():
    """Renaming to transformers and back changes no bit; without its values a block is refused."""
    tensors = build_backbone(VIT).state_dict()
    _, there = exported(VIT, tensors, "hf")
    back, folded = ours({f"vit.{name}": tensor for name, tensor in there.items()}), exported(VIT, tensors, "torch")[1]
    assert back.keys() == folded.keys() and all(torch.equal(back[name], folded[name]) for name in back)
    del there["encoder.layer.1.attention.attention.value.weight"]
    with pytest.raises(RunError, match=r"Block 1 .* query, key and value"):
        from_hf(there)


@pytest.mark.parametrize(
    ("backbone", "layout"), [(SWIN, "hf"), (SWIN, "torch"), (MCMAE, "timm"), (MCMAE, "hf")], ids=lambda v: getattr(v, "kind", v)
)
def test_a_pair_that_nobody_reads_is_refused(tmp_path, backbone, layout):
    """The refusal names what works."""
    works = {"swin": "--format timm", "mcmae": "--format torch"}[backbone.kind]
    assert works in refused(str(a_run(tmp_path / "run", backbone)), "-o", str(place(tmp_path, layout)), "--format", layout)
    assert not place(tmp_path, layout).exists()


@pytest.mark.parametrize("layout", ["timm", "hf", "torch"])
def test_what_is_there_stays(tmp_path, layout):
    """The same export again changes nothing; another one, or other files, are refused and left as they are."""
    run, out = a_run(tmp_path / "run", VIT), place(tmp_path, layout)
    assert write(run, out, layout)["new"] is True
    assert write(run, out, layout)["new"] is False
    other = a_run(tmp_path / "other", replace(VIT, heads=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("s*") if path.is_file()}
    assert "is there already" in refused(str(other), "-o", str(out), "--format", layout)
    assert before == {path: path.read_bytes() for path in before}
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_input(tmp_path):
    """One sentence each: no checkpoint, no such format, a place that cannot be."""
    (tmp_path / "empty").mkdir()
    run = a_run(tmp_path / "run", VIT)
    assert "holds no checkpoint" in refused(str(tmp_path / "empty"), "-o", str(tmp_path / "a.safetensors"), "--format", "timm")
    assert "There is no " in refused(str(tmp_path / "none"), "-o", str(tmp_path / "a.safetensors"), "--format", "timm")
    assert "'timm', 'hf', 'torch'" in refused(str(run), "-o", str(tmp_path / "a"), "--format", "onnx")
    assert "must end in .safetensors" in refused(str(run), "-o", str(tmp_path / "a.pth"), "--format", "timm")
    assert "is a folder" in refused(str(run), "-o", str(tmp_path), "--format", "torch")
    assert "there is no folder" in refused(str(run), "-o", str(tmp_path / "no" / "a.pth"), "--format", "torch")
    with pytest.raises(ConfigError, match="There is no format 'onnx'; there are hf, timm, torch"):
        exported(VIT, {}, "onnx")


def forged(path: Path, backbone: dict) -> None:
    """An export whose record describes another encoder, with sums that fit."""
    tensors, record = read_weights(path).tensors, read_weights(path).record.to_json()
    record["backbone"] |= backbone
    save_file(tensors, path, metadata={"student_export": json.dumps(record)})


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"dim": 4096}, "does not hold the encoder that its record describes"),
        ({"depth": 2}, "blocks.2.attn.proj.bias is amiss"),
        ({"hidden": "mask-token"}, None),
        ({"heads": 5}, "multiple of heads=5"),
        ({"kind": "resnet"}, "backbone.kind must be one of"),
    ],
    ids=str,
)
def test_a_record_is_not_believed(tmp_path, backbone, message):
    """What a file says of itself is compared with its weights before memory is taken for it."""
    out = tmp_path / "s.safetensors"
    write(a_run(tmp_path / "run", VIT), out, "timm")
    forged(out, backbone)
    if message is None:
        assert not load_exported(out)[0].mask_token.any()
        return
    with pytest.raises(RunError, match=message):
        load_exported(out)


def test_a_file_that_is_no_export(tmp_path):
    """A checkpoint, a changed byte and a foreign file are told apart from an export."""
    run, out = a_run(tmp_path / "run", VIT), tmp_path / "s.safetensors"
    with pytest.raises(RunError, match="not what student-export says"):
        load_exported(run / "checkpoint-00000010.safetensors")
    write(run, out, "timm")
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        load_exported(out)
    out.write_bytes(data[:-100])
    with pytest.raises(RunError, match="cut short"):
        load_exported(out)
    torch.save({"model": {"a": 1}}, tmp_path / "s.pth")
    with pytest.raises(RunError, match="holds no state dict"):
        read_weights(tmp_path / "s.pth")
    torch.save({"model": Path("a")}, tmp_path / "s.pth")
    with pytest.raises(RunError, match="cannot be read as weights"):
        read_weights(tmp_path / "s.pth")


@pytest.mark.parametrize(
    ("backbone", "layout"), [(VIT, "timm"), (SWIN, "timm"), (MCMAE, "torch"), (VIT, "hf")], ids=["vit", "swin", "mcmae", "hf"]
)
def test_the_card(tmp_path, monkeypatch, backbone, layout):
    """Front matter is YAML, the facts are in it, and what it says about loading runs where the file is."""
    run, out = a_run(tmp_path / "run", backbone), place(tmp_path, layout)
    write(run, out, layout)
    text = (out / "README.md" if layout == "hf" else out.with_name(out.name + ".md")).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == {"timm": "timm", "hf": "transformers", "torch": "pytorch"}[layout]
    for fact in ("tiny", "fake", "d" * 64, "c" * 64, "0.485, 0.456, 0.406", "10 of 4 crops", "None is on record"):
        assert fact in body
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert blocks
    has_transformers = importlib.util.find_spec("transformers") is not None
    code = "\n".join(block for block in blocks if has_transformers or "transformers" not in block)
    code += f"\nassert tokens.shape[0] == 1 and tokens.shape[-1] == {backbone.dim}"
    monkeypatch.chdir(out.parent)
    exec(code, {})


def test_an_untrained_norm_is_said(tmp_path):
    """MaskAlign never trains the final norm; the card says so."""
    run = a_run(tmp_path / "run", VIT)
    write(run, tmp_path / "a.safetensors", "timm")
    assert "never trained" not in (tmp_path / "a.safetensors.md").read_text()
    config = tiny_config(objectives=(AlignConfig(levels=2),))
    student = Student(config, (TEACHER,))
    (tmp_path / "b").mkdir()
    save_checkpoint(tmp_path / "b", 10, student, build_optimizer(student, config.optim), config, {}, pixels=PIXELS)
    write(tmp_path / "b", tmp_path / "b.safetensors", "timm")
    assert "never trained (gain 1, shift 0)" in (tmp_path / "b.safetensors.md").read_text()


def test_evaluations_and_licences_on_the_card(tmp_path, shared_cache):
    """The card has the records of these very weights, of no others, and the licence of a teacher where it is known."""
    run = a_run(tmp_path / "run", replace(VIT, image_size=32, patch_size=8))
    other = a_run(tmp_path / "other", replace(VIT, image_size=32, patch_size=8, heads=2))
    data, records = ["--train", str(shared_cache.path), "--val", str(shared_cache.path)], tmp_path / "results.jsonl"
    for what in (run, other):
        done = CliRunner().invoke(
            evaluate, ["knn", str(what), *data, "--features", str(tmp_path / "f"), "--record", str(records)]
        )
        assert done.exit_code == 0, done.output
    write(run, tmp_path / "a.safetensors", "timm", "--evaluations", str(records))
    lines = [line for line in (tmp_path / "a.safetensors.md").read_text().splitlines() if line.startswith("- knn")]
    found = [json.loads(line) for line in records.read_text().splitlines()]
    mine = [record for record in found if record["what"] == str(run)]
    assert len(found) == 2 * len(mine) == 4 and len(lines) == 2
    assert all(f"{record['results'][record['main']]['mean']:.1%}" in " ".join(lines) for record in mine)

    records.write_text("\n".join(json.dumps(record) for record in found if record not in mine))
    place = str(tmp_path / "b.safetensors")
    assert "no record is of the weights" in refused(str(run), "-o", place, "--format", "timm", "--evaluations", str(records))
    assert _teacher_lines({"teachers": ["clip-b16", "timm:vit_base_patch16_224.mae", "mine"], "data": {}}) == [
        "`clip-b16`, published under MIT",
        "`timm:vit_base_patch16_224.mae`, published under cc-by-nc-4.0",
        "`mine`, licence not on record: look where its weights come from",
    ]
