"""The decoders of MAE and MILAN and CAE v2's regressor in numpy, written from their formulas: one image, one head at a time.

`weights` maps parameter names to float64 arrays. What differs between the methods is an argument of `predict`.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def sincos(dim: int, rows: int, columns: int, columns_first: bool) -> np.ndarray:
    """Position table [rows * columns, dim]; `columns_first`: MAE's convention, else MoCo v3's and CAE's."""
    omega = np.array([10000.0 ** (-k / (dim // 4)) for k in range(dim // 4)])
    table = []
    for row in range(rows):
        for column in range(columns):
            first, second = (column, row) if columns_first else (row, column)
            table.append(
                np.concatenate([np.sin(first * omega), np.cos(first * omega), np.sin(second * omega), np.cos(second * omega)])
            )
    return np.stack(table)  # fmt: skip


def linear(x, weights, name):
    """x W^T + b, without b where there is none."""
    return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)


def layer_norm(x, weights, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * weights[name + ".weight"] + weights[name + ".bias"]


def mlp(x, weights, name):
    hidden = linear(x, weights, name + ".fc1")
    return linear(hidden * (1 + _erf(hidden / np.sqrt(2))) / 2, weights, name + ".fc2")


def attend(q, k, v, n_heads):
    """softmax(q k / sqrt(d)) v for q [n, D], k and v [m, D], each head over its own d = D / n_heads channels."""
    size = q.shape[1] // n_heads
    out = np.empty_like(q)
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
        out[:, part] = scores / scores.sum(1, keepdims=True) @ v[:, part]
    return out


def predict(weights, tokens, keep, drop, *, style, depth, n_heads, grid, has_cls=True, prefix=""):
    """[B, C+N, D]: CLS, then patches row by row, from `tokens` [B, C+n_keep, any width]; keep, drop: [B, n] integers."""
    images = zip(tokens, keep, drop, strict=True)
    return np.stack([_predict_one(weights, *image, style, depth, n_heads, grid, has_cls, prefix) for image in images])


def _predict_one(w, tokens, keep, drop, style, depth, n_heads, grid, has_cls, prefix):
    mask_token = w[prefix + "mask_token"][0, 0]
    dim, n_cls = len(mask_token), int(has_cls)
    places = sincos(dim, *grid, columns_first=style != "regressor")
    if prefix + "embed.weight" in w:
        tokens = linear(tokens, w, prefix + "embed")
    if prefix + "embed_norm.weight" in w:
        tokens = layer_norm(tokens, w, prefix + "embed_norm")

    out = np.empty((n_cls + len(places), dim))
    out[:n_cls] = tokens[:n_cls]
    visible = tokens[n_cls:].copy()
    hidden = np.stack([mask_token] * len(drop)) if len(drop) else np.empty((0, dim))
    if style != "regressor":
        visible, hidden = visible + places[keep], hidden + places[drop]
    out[n_cls + keep] = visible
    out[n_cls + drop] = hidden

    for number in range(depth):
        block = f"{prefix}blocks.{number}."
        if style == "self":
            out = _self_block(out, w, block, n_heads)
        elif style == "prompting":
            out[n_cls + drop] = _prompting_block(out[n_cls + drop], np.concatenate([out[:n_cls], visible]), w, block, n_heads)
        else:
            out[n_cls + drop] = _regressor_block(out[n_cls + drop], visible, places[drop], places[keep], w, block, n_heads)
    return layer_norm(out, w, prefix + "norm")


def _self_block(x, w, block, n_heads):
    """X += A(LN1 X), X += MLP(LN2 X), every token looks at every token (MAE)."""
    q, k, v = np.split(linear(layer_norm(x, w, block + "norm1"), w, block + "attn.qkv"), 3, axis=1)
    x = x + linear(attend(q, k, v, n_heads), w, block + "attn.proj")
    return x + mlp(layer_norm(x, w, block + "norm2"), w, block + "mlp")


def _prompting_block(x, z, w, block, n_heads):
    """X += A(q = Wq LN1 X; k, v = Wkv [Z ; LN1 X]), X += MLP(LN2 X); Z, not normed, stays as it was (MILAN)."""
    normed = layer_norm(x, w, block + "norm1")
    k, v = np.split(linear(np.concatenate([z, normed]), w, block + "attn.kv"), 2, axis=1)
    x = x + linear(attend(linear(normed, w, block + "attn.q"), k, v, n_heads), w, block + "attn.proj")
    return x + mlp(layer_norm(x, w, block + "norm2"), w, block + "mlp")


def _regressor_block(x, visible, at_x, at_visible, w, block, n_heads):
    """X += g1 A(q = LNq(X + p); k = LNk([V ; X] + p); v = LNv [V ; X]), X = LN2 X, X += g2 MLP X (CAE v2)."""
    both, at_both = np.concatenate([visible, x]), np.concatenate([at_visible, at_x])
    q = linear(layer_norm(x + at_x, w, block + "norm1_q"), w, block + "attn.q")
    k = linear(layer_norm(both + at_both, w, block + "norm1_k"), w, block + "attn.k")
    v = linear(layer_norm(both, w, block + "norm1_v"), w, block + "attn.v")
    x = x + w.get(block + "ls1.gamma", 1.0) * linear(attend(q, k, v, n_heads), w, block + "attn.proj")
    x = layer_norm(x, w, block + "norm2")
    return x + w.get(block + "ls2.gamma", 1.0) * mlp(x, w, block + "mlp")
