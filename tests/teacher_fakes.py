"""What the tests of the teachers share: crops, and the official checkpoints of each family, made of random weights."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from teacher_cache.teachers import TeacherEntry
from teacher_cache.teachers.weights.load import random_weights


def crops_u8(n: int, side: int, seed: int = 5) -> Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def timm_vit(entry: TeacherEntry, seed: int = 0, **changes) -> VisionTransformer:
    """timm's ViT of an entry, with random weights and, where the family has one, its fixed position table."""
    model = VisionTransformer(
        img_size=entry.image_size,
        patch_size=entry.patch_size,
        embed_dim=entry.dim,
        depth=entry.depth,
        num_heads=entry.heads,
        num_classes=0,
        weight_init="skip",
        **changes,
    ).eval()
    random_weights(model, seed)
    if entry.module in ("mae", "moco_v3"):
        model.pos_embed.data = fixed_table(entry.grid[0], entry.dim, rows_first=entry.module == "moco_v3")
    return model


def timm_swin(seed: int = 0) -> SwinTransformer:
    """timm's Swin-T with random weights."""
    model = SwinTransformer(num_classes=0, weight_init="skip").eval()
    random_weights(model, seed)
    return model


def fixed_table(side: int, dim: int, rows_first: bool) -> Tensor:
    """[1, 1 + side * side, dim], token by token as the two papers' functions define it."""
    table = np.zeros((1 + side * side, dim))
    for row in range(side):
        for column in range(side):
            halves = (row, column) if rows_first else (column, row)
            for half, place in enumerate(halves):
                for k in range(dim // 4):
                    angle = place / 10_000 ** (k / (dim // 4))
                    table[1 + row * side + column, half * (dim // 2) + k] = np.sin(angle)
                    table[1 + row * side + column, half * (dim // 2) + dim // 4 + k] = np.cos(angle)
    return torch.from_numpy(table).float()[None]


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().clone() for name, tensor in state.items()}


def noise(*names: str) -> dict[str, Tensor]:
    """Tensors of parts that are no teacher's."""
    return {name: torch.full((2, 3), 7.0) for name in names}


def arguments() -> argparse.Namespace:
    return argparse.Namespace(arch="vit", lr=np.float64(5e-4), betas=(0.9, 0.98), output_dir=None)


def optimizer_state() -> dict:
    """What AdamW leaves in a checkpoint, the rate being of numpy as cosine schedules of numpy make it."""
    return {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": np.float64(1e-3), "params": [0], "betas": (0.9, 0.999)}],
    }


def dino_file(model: nn.Module) -> dict:
    """`*_pretrain.pth`."""
    return prefixed("", model.state_dict())


def dino_full_file(model: nn.Module, seed: int = 9) -> dict:
    """`*_full_checkpoint.pth`: the student has other weights."""
    state = model.state_dict()
    student = {name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) for name, tensor in state.items()}
    return {
        "student": prefixed("module.backbone.", student) | noise("module.head.mlp.0.weight"),
        "teacher": prefixed("backbone.", state) | noise("head.mlp.0.weight", "head.last_layer.weight_g"),
        "optimizer": optimizer_state(),
        "epoch": 800,
        "args": arguments(),
        "dino_loss": {"center": torch.zeros(1, 5)},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 7},
    }


def moco_file(model: nn.Module) -> dict:
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    return {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed("module.base_encoder.", model.state_dict())
        | noise("module.base_encoder.head.0.weight", "module.base_encoder.head.1.running_mean")
        | prefixed("module.momentum_encoder.", other)
        | noise("module.momentum_encoder.head.0.weight", "module.predictor.0.weight"),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.0, "params": [0]}]},
        "scaler": {"scale": 65536.0},
    }


def slip_file(model: nn.Module, projection: Tensor) -> dict:
    return {
        "epoch": 25,
        "state_dict": prefixed("module.visual.", model.state_dict())
        | {"module.image_projection": projection}
        | noise(
            "module.positional_embedding",
            "module.text_projection",
            "module.logit_scale",
            "module.token_embedding.weight",
            "module.ln_final.weight",
            "module.transformer.resblocks.0.ln_1.weight",
            "module.image_mlp.layer1.weight",
            "module.image_mlp.bn1.running_mean",
        ),
        "optimizer": optimizer_state(),
        "scaler": {"scale": 65536.0},
        "best_acc1": np.float64(38.3),
        "args": arguments(),
    }


def mae_file(model: nn.Module) -> dict:
    return {"model": prefixed("", model.state_dict())}


def moby_file(model: nn.Module) -> dict:
    """Official names: a stage's downsampling stands at its end, and two buffers are in the file. Its config is of yacs."""
    encoder = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if len(parts) > 2 and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        encoder[".".join(parts)] = tensor
    encoder["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    encoder["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    return {
        "model": prefixed("encoder.", encoder)
        | prefixed("encoder_k.", {"norm.weight": encoder["norm.weight"] + 1})
        | noise("projector.linear_out.weight", "projector_k.linear_out.weight", "predictor.linear_out.weight", "queue1", "queue2")
        | {"queue_ptr": torch.zeros(1, dtype=torch.int64)},
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 300},
        "max_accuracy": 0.0,
        "epoch": 299,
        "config": yacs_config(MODEL=yacs_config(TYPE="moby", NUM_CLASSES=0), AMP_OPT_LEVEL="O1"),
    }


def yacs_config(**items):
    """An instance of a class that pickles as yacs's CfgNode does: dictionary items, and a state with a set in it."""
    node = CfgNode(items)
    node.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__new_allowed__": False})
    return node


CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
FAKE_MODULES = {name: types.ModuleType(name) for name in ("yacs", "yacs.config")}
FAKE_MODULES["yacs.config"].CfgNode = CfgNode


def save(value: dict, path: Path, **options) -> Path:
    """torch.save while the fake modules can be imported; afterwards they cannot."""
    sys.modules.update(FAKE_MODULES)
    try:
        torch.save(value, path, **options)
    finally:
        for module in FAKE_MODULES:
            del sys.modules[module]
    return path
