"""Made-up tokens that a transform is good for, and transforms fitted to them."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np

from teacher_cache.encoding.klt_fit import fit_transform
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.quantize import ChannelStatistics
from teacher_cache.format.spec import StoreSpec
from teacher_cache.format.transform import Transform

DIM, LAYERS = 24, (4, 5, 6)


def spec_of(dtype: str = "klt:3.2", layers=LAYERS, group: int | None = None, **changes) -> StoreSpec:
    """Of 240 rows of the fake teacher."""
    from fakes import FakeTeacher

    given = {"layers": ",".join(map(str, layers)), "dtype": dtype, "shard_rows": 60, **changes}
    spec = ExtractPlan(**given).store_spec(FakeTeacher().spec, 240)
    return spec if group is None else StoreSpec(**{**spec.to_json(), "group": group})


def residual_stream(n: int, seed: int = 0, n_layers: int = 3, dim: int = DIM) -> np.ndarray:
    """float32 [L, n, D]: each layer is the one before and something more, with a spectrum that falls; offsets by channel."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0] * 0.85 ** np.arange(dim)[:, None]
    steps = rng.standard_normal((n_layers, n, dim)) @ mixing * np.array([1, *[0.4] * (n_layers - 1)])[:, None, None]
    return (steps.cumsum(0) + np.linspace(-2, 2, dim)).astype("float32")


@cache
def fitted(dtype: str = "klt:3.2", group: int | None = None) -> tuple[StoreSpec, Transform, dict[int, ChannelStatistics]]:
    """A transform of the residual stream of three layers."""
    spec, tokens = spec_of(dtype, group=group), residual_stream(4000)
    statistics = {layer: ChannelStatistics.fit(tokens[place]) for place, layer in enumerate(spec.layers)}
    sample = SimpleNamespace(n_fitted=4000, shape=(4000, DIM), n_layers=3, tokens=lambda place, of=slice(None): tokens[place, of])
    return spec, fit_transform(sample, spec, statistics), statistics
