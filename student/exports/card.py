"""The model card of an export, in the form of Hugging Face: front matter in YAML, then Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..config import MCMAEConfig, ViTConfig
from ..files.changes import from_json
from .record import ExportRecord

LIBRARIES = {"timm": "timm", "hf": "transformers", "torch": "pytorch"}
MAE_MODELS = {
    (768, 12, 12, 16): "vit_base_patch16",
    (1024, 24, 16, 16): "vit_large_patch16",
    (1280, 32, 16, 14): "vit_huge_patch14",
}
"""(width, depth, heads, patch) -> the `--model` of MAE's main_finetune.py."""


def card(
    record: ExportRecord, file_name: str, norm_is_trained: bool, teachers: Sequence[str] = (), evaluations: Sequence[str] = ()
) -> str:
    """The text of the card of `file_name`, a file or a folder.

    teachers, evaluations: a line of Markdown for each.
    """
    facts, config = record.made_from, record.config
    sections = [
        f"# {facts['preset']}: {_kind(record)}",
        f"Trained without labels by the objective{'s' * (len(facts['objectives']) > 1)} {', '.join(facts['objectives'])}, from "
        "masked images" + (" and the stored targets of a frozen teacher." if facts["teachers"] else "."),
        "## Load it",
        *_how_to_load(record, file_name),
        "## What it is",
        _table(_encoder_rows(record, norm_is_trained)),
        "## How it was trained",
        _table(_training_rows(record)),
        "## Its teachers",
        "\n".join(f"- {line}" for line in teachers) or "It had none.",
        "## Evaluations",
        "\n".join(f"- {line}" for line in evaluations) or "None is on record in its run.",
    ]
    tags = ["image-feature-extraction", "masked-image-modelling", config.kind, *(["distillation"] if facts["teachers"] else [])]
    front = {"library_name": LIBRARIES[record.layout], "pipeline_tag": "image-feature-extraction", "tags": tags}
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"---\n{matter}\n---\n\n" + "\n\n".join(sections) + "\n"


def _kind(record: ExportRecord) -> str:
    config = record.config
    names = {"vit": f"a ViT/{config.stride}", "swin": "a Swin", "mcmae": "a ViT behind two convolution stages (MCMAE)"}
    return f"{names[config.kind]}, {config.dim} wide, at {config.image_size} px"


def _how_to_load(record: ExportRecord, file_name: str) -> list[str]:
    """Paragraphs; what is fenced as python runs in the folder of the file."""
    config = record.config
    mean, std = (json.dumps(record.pixels.get(key)) for key in ("mean", "std"))
    parts = []
    if record.layout == "hf":
        parts.append(_python(
            "import torch", "from transformers import ViTModel", "",
            f"model = ViTModel.from_pretrained({file_name!r}, add_pooling_layer=False).eval()",
            f"tokens = model(pixel_values=torch.zeros(1, 3, {config.image_size}, {config.image_size})).last_hidden_state",
        ))  # fmt: skip
        parts.append("Without `add_pooling_layer=False` transformers adds a pooling layer with random weights.")
    if record.timm:
        given = "".join(f", {key}={_literal(value)}" for key, value in record.timm["kwargs"].items())
        overlay = f'pretrained_cfg_overlay={{"mean": {mean}, "std": {std}, "interpolation": "bicubic"}}'
        call = f'model = timm.create_model("{record.timm["name"]}", checkpoint_path={file_name!r}, num_classes=0{given}'
        parts.append(_python(
            "import timm", "import torch", "",
            f"{call}{f', {overlay}' if record.pixels else ''}).eval()",
            f"tokens = model.forward_features(torch.zeros(1, 3, {config.image_size}, {config.image_size}))",
        ))  # fmt: skip
        if "num_heads" in record.timm["kwargs"]:
            parts.append("Leave no argument out: weights of another number of heads load without an error and mean nothing.")
    if record.layout == "torch":
        model = "--model convvit_base_patch16"
        if isinstance(config, ViTConfig):
            known = MAE_MODELS.get((config.dim, config.depth, config.heads, config.patch_size))
            model = f"--model {known}" if known else "and a model of these sizes"
        code = "MCMAE's" if isinstance(config, MCMAEConfig) else "MAE's"
        parts.append(f"With {code} code: `python main_finetune.py --finetune {file_name} {model} ...`.")
    if isinstance(config, MCMAEConfig):
        parts.append(
            "The released code of MCMAE has no CLS token: it leaves `cls_token` out and computes other features than this "
            "encoder, whose patches attended to one. With it:"
        )
    else:
        parts.append("With the library that trained it:")
    parts.append(_python(
        "import torch", "from student.exports.reading import load_exported", "",
        f"backbone, record = load_exported({file_name!r})",
        f"tokens = backbone.encode_all(torch.zeros(1, 3, {config.image_size}, {config.image_size}))",
    ))  # fmt: skip
    return parts


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _literal(value) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else repr(value)


def _encoder_rows(record: ExportRecord, norm_is_trained: bool) -> list[tuple[str, str]]:
    config = record.config
    tokens = f"{config.n_patches} of patches, {config.grid[0]} x {config.grid[1]}, row by row"
    rows = [
        ("input", f"RGB, {config.image_size} x {config.image_size} pixels"),
        ("tokens", f"CLS, then {tokens}" if config.has_cls else tokens),
        ("width, blocks, heads", f"{config.dim}, {config.depth}, {_words(config.heads)}"),
        (
            "final norm",
            "trained" if norm_is_trained else "never trained (gain 1, shift 0): fine-tuning has one of its own",
        ),
    ]
    if record.pixels:
        rows.insert(1, ("pixels, of 0..1", f"minus {_words(record.pixels['mean'])}, over {_words(record.pixels['std'])}"))
    else:
        rows.insert(1, ("pixels", "the run has no record of what they were normalised by"))
    if isinstance(config, ViTConfig):
        rows.append(("position table", f"fixed sine and cosine, as in {'MAE' if config.positions == 'mae' else 'MoCo v3'}"))
        scale = "in the file" if config.layer_scale else "none, or multiplied into the layers before it"
        rows.append(("layer scale", scale))
    rows.append(("sha256 of the weights", f"`{record.weights_sha256}`"))
    return rows


def _training_rows(record: ExportRecord) -> list[tuple[str, str]]:
    facts = record.made_from
    data = facts["data"] if isinstance(facts["data"], dict) else {}
    views = data.get("views")
    rows = [
        ("preset", facts["preset"]),
        ("mask", f"{facts['mask'].get('kind')}, {facts['mask'].get('ratio')} hidden"),
        ("steps", f"{facts['step']:,} of {facts['batch_size']:,} crops; the run was begun for {facts['epochs']:,} epochs"),
        ("seed", f"{facts['seed']}"),
        ("weights", facts["weights"]),
    ]
    if facts["init"]:
        rows.append(("begun from", f"{facts['init'].get('from')}, sha256 `{facts['init'].get('sha256')}`"))
    if isinstance(data.get("crops_id"), str):
        rows.append(("crops of the cache", f"`{data['crops_id']}`"))
    if isinstance(views, list):
        rows.append(("views of the cache", f"{len(views)}, one drawn crop of each image each"))
    if data.get("accepted_mismatch"):
        rows.append(("other than the preset's", _words(data["accepted_mismatch"])))
    for change in from_json(facts["changes"], "The record of the export"):
        rows.append(("changed under way", str(change)))
    return rows


def _words(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows)])
