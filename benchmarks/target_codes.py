"""Ways to store five layers of tokens in few bytes, at equal bytes and at equal error: those of this project, and their rivals.

All are fitted on the same tokens of the same crops, and measured on the same tokens of other crops. The tokens are those that
`--dtype klt:BITS` is fitted on and measured on. Its rivals (target_rivals.py): the uniform quantiser of int4 with more bits, a
rotation that knows nothing of the tokens, product quantisation, and the same transform of all layers at once, which no reader
of one layer could read apart, or of each layer alone.

Trained weights of a network for photographs are given: `--weights FILE --images FOLDER`. Without them the built-in teacher says
what it sees in digits; its figures have no goals.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch

from pipelines.demo.data import write_digits
from teacher_cache.crops.beton import CropReader
from teacher_cache.encoding.encode import quantise_on_host, take_tokens
from teacher_cache.encoding.fit import FIT_ROWS, HELD_ROWS, Sample, least_rows
from teacher_cache.encoding.klt_encode import TransformEncoder
from teacher_cache.encoding.klt_fit import fit_transform, round_trip
from teacher_cache.extraction.planning import ExtractPlan
from teacher_cache.format.crop_plan import CropPlan
from teacher_cache.format.quantize import GROUPS, ChannelStatistics, dequantise, token_errors
from teacher_cache.format.spec import StoreSpec, TeacherSpec
from teacher_cache.format.transform import token_bytes
from teacher_cache.teachers import load_teacher

from . import made_up, measure, target_rivals

BATCH = 16
KLT_BITS = ("2.5", "3", "3.2", "4", "4.8", "6")
MOST_FITTED = 80_000
"""Tokens that rivals are fitted on, which are shuffled before."""
MOST_IMAGES = 2 * FIT_ROWS + HELD_ROWS


@dataclass(frozen=True)
class Tokens:
    """What all are fitted on and measured on."""

    spec: StoreSpec
    sample: Sample
    statistics: list[ChannelStatistics]
    """Of each layer."""

    def fitted(self) -> np.ndarray:
        """float32 [L, n, D], whitened."""
        return np.stack([self.sample.tokens(i, slice(self.sample.n_fitted)) for i in range(self.sample.n_layers)])

    def held(self) -> np.ndarray:
        """float32 [L, n, D], whitened, of crops that none of the others is of; a row's first is CLS if there is one."""
        return np.stack([self.sample.tokens(i, slice(self.sample.n_fitted, None)) for i in range(self.sample.n_layers)])

    def standard(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([s.standardise(t) for s, t in zip(self.statistics, tokens, strict=True)]))

    def whitened(self, standard: torch.Tensor) -> np.ndarray:
        return np.stack([t * s.spread + s.centre for s, t in zip(self.statistics, standard.numpy(), strict=True)])


def fill_sample(sample: Sample, teacher, crops: CropReader, layers: tuple[int, ...]) -> None:
    """Tokens of the first crops, drawn as an extraction draws them."""
    for start in range(0, sample.size.all_rows, BATCH):
        rows = np.arange(start, min(start + BATCH, sample.size.all_rows))
        output = teacher(torch.from_numpy(crops.read(rows)), layers)
        sample.add(take_tokens(output.tokens, torch.from_numpy(sample.draw(len(rows)))).numpy())


def by_product(tokens: Tokens, dtype: str, teacher: TeacherSpec):
    """Bits a value, and a function from tokens [L, n, D] to what a store of `dtype` gives back."""
    spec = ExtractPlan(layers="last5", dtype=dtype).store_spec(teacher, tokens.spec.n_rows)
    if not spec.is_transformed:
        group = min(GROUPS[dtype], teacher.dim)

        def read_back(true: np.ndarray) -> np.ndarray:
            stored = [quantise_on_host(t, s, dtype, group) for t, s in zip(true, tokens.statistics, strict=True)]
            return np.stack([dequantise(*q, s, dtype, group) for q, s in zip(stored, tokens.statistics, strict=True)])

        return int(dtype[3:]) + 16 / group, read_back

    statistics = dict(zip(spec.layers, tokens.statistics, strict=True))
    transform = fit_transform(tokens.sample, spec, statistics)
    encode = TransformEncoder(spec, transform, statistics, torch.device("cpu"))

    return 8 * token_bytes(dtype, teacher.dim) / teacher.dim, lambda true: round_trip(true, encode, transform)


def all_codes(tokens: Tokens, teacher: TeacherSpec, tiny: bool) -> Iterator[tuple]:
    """(name, bits a value, function from tokens to tokens) of each way."""
    for dtype in ("int8", "int4", *(f"klt:{bits}" for bits in (("3.2",) if tiny else KLT_BITS))):
        yield dtype, *by_product(tokens, dtype, teacher)
    fitted = tokens.standard(tokens.fitted())
    which = np.random.default_rng(0).permutation(fitted.shape[1])[:MOST_FITTED]
    fitted = fitted[:, torch.from_numpy(np.sort(which))]
    rivals = [target_rivals.uniform(bits, group) for bits, group in ((6, 128), (5, 128), (6, 16), (5, 16), (3, 16))]
    kinds = ("random", "Hadamard")
    rivals += [target_rivals.rotated(fitted, bits, kind) for bits, kind in itertools.product((3, 4, 5), kinds)]
    rivals += [target_rivals.product(fitted, n, bits) for n, bits in (((2, 4),) if tiny else ((2, 6), (2, 7), (4, 8)))]
    for together in (True, False):
        spectrum = target_rivals.Spectrum(fitted, together)
        rivals += [spectrum.code(bits, has_scale) for bits in (3.2, 4.8) for has_scale in (False, True)]
    for rival in rivals:
        yield rival.name, rival.bits, lambda true, rival=rival: tokens.whitened(rival.read_back(tokens.standard(true)))


def figures_of(tokens: Tokens, bits: float, read_back, held: np.ndarray) -> dict:
    """Errors of patches of all layers together, and of each; of CLS apart."""
    read = read_back(held)
    errors = np.stack([token_errors(*each) for each in zip(held, read, tokens.statistics, strict=True)])
    errors = errors.reshape(len(held), -1, tokens.sample.n_drawn)
    n_cls = int(tokens.sample.has_cls)
    patches = errors[..., n_cls:].reshape(len(held), -1)
    by_layer = np.median(patches, 1)
    found = {
        "bits": bits, "of float16": bits / 16, "median": float(np.median(patches)), "p99": float(np.quantile(patches, 0.99)),
        "worst": float(patches.max()), "worst layer": float(by_layer.max()), "last layer": float(by_layer[-1]),
        "by layer": " ".join(f"{value:.4f}" for value in by_layer),
    }  # fmt: skip
    return found | ({"CLS": float(np.median(errors[..., 0]))} if n_cls else {})


def unlike(tokens: Tokens, read_back) -> dict:
    """Errors of tokens that no network said: of random direction, and with one channel of 50 times the others' size."""
    rng = np.random.default_rng(0)
    shape = (tokens.sample.n_layers, 512, tokens.sample.shape[1])
    random = rng.standard_normal(shape, "float32")
    massive = rng.standard_normal(shape, "float32")
    massive[:, np.arange(512), rng.integers(0, shape[2], 512)] *= 50
    found = {}
    for name, made in (("of random direction", random), ("with a massive channel", massive)):
        made -= made.mean(-1, keepdims=True)
        made /= made.std(-1, keepdims=True)
        read = read_back(made)
        errors = [token_errors(*each) for each in zip(made, read, tokens.statistics, strict=True)]
        found[name] = {"median": float(np.median(errors)), "worst": float(np.max(errors))}
    return found


def claims_of(found: dict, has_goals: bool) -> list[measure.Claim]:
    def claim(name: str, value: float, goal: float) -> measure.Claim:
        return measure.claim(name, [value], goal if has_goals else None, at_most=True)

    few = found["klt:3.2"]
    claims = [
        claim("bytes / float16, klt:3.2", few["of float16"], 0.2), claim("median error of a token, klt:3.2", few["median"], 0.08),
        claim("median error, worst layer, klt:3.2", few["worst layer"], 0.09), claim("p99, klt:3.2", few["p99"], 0.16),
        claim("median error, the last layer alone, klt:3.2", few["last layer"], 0.08),
    ]  # fmt: skip
    if "klt:4.8" in found:
        many = found["klt:4.8"]
        claims += [
            claim("bytes / float16, klt:4.8", many["of float16"], 0.3),
            claim("median error of a token, klt:4.8", many["median"], 0.03),
        ]
    return claims


@click.command()
@click.option("--weights", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Trained ones, of --teacher.")
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A folder of at least 400.")
@click.option("--teacher", "name", default="timm:vit_small_patch14_dinov2", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@measure.options
def main(weights: Path | None, images: Path | None, name: str, image_size: int, tiny: bool, rounds: int, scratch: Path | None):
    """Bits a value and errors of all ways to store tokens, on crops that they were not fitted on. One round is run."""
    if (weights is None) != (images is None):
        raise click.UsageError("--weights and --images go together: trained weights, and photographs to run them on.")
    where = measure.environment()
    name, image_size = (name, image_size) if weights else ("demo", None)
    teacher = load_teacher(name, weights, image_size)
    figures, size = {}, teacher.spec.image_size
    with measure.scratch_folder(scratch, 2_000_000_000 if weights else 0) as folder:
        images = images or write_digits(folder / "digits") / "train"
        spec = ExtractPlan(layers="last5", dtype="klt:3.2").store_spec(teacher.spec, MOST_IMAGES)
        n_images = sum(path.suffix.lower() in (".jpg", ".jpeg", ".png") for path in images.rglob("*"))
        n_images = min(n_images, least_rows(spec, teacher.spec) if tiny else MOST_IMAGES)
        cache = made_up.make_cache(folder, n_images, size, images, CropPlan(size=size, scale=(0.2, 1.0)))
        spec = replace(spec, n_rows=cache.n_images)
        with Sample(folder, spec, teacher.spec) as sample:
            fill_sample(sample, teacher, CropReader(cache.view(0).path), spec.layers)
            of_fit = slice(sample.n_fitted)
            tokens = Tokens(spec, sample, [ChannelStatistics.fit(sample.tokens(i, of_fit)) for i in range(sample.n_layers)])
            held = tokens.held()
            for code, bits, read_back in all_codes(tokens, teacher.spec, tiny):
                figures[code] = figures_of(tokens, bits, read_back, held)
                click.echo(f"  {code}: {figures[code]}")
                if code in ("int4", "klt:3.2"):
                    figures |= {f"{code}, tokens {what}": values for what, values in unlike(tokens, read_back).items()}
    layers = ", ".join(map(str, spec.layers))
    conditions = [
        f"{name}, {teacher.spec.weights}, layers {layers}, {size} px, crops of .2 to 1 of an image; fitted on "
        f"{sample.n_fitted:,} tokens of {sample.size.n_rows:,} crops, measured on {held.shape[1]:,} of "
        f"{sample.size.n_held:,} others",
        "error: standardised by channel, relative L2 of a token (docs/format.md, section 6); of patches, CLS apart; bits a value "
        "with the scales of a token, without what a store keeps once",
    ]  # fmt: skip
    measure.report("target-codes", claims_of(figures, weights is not None), figures, conditions, where)


if __name__ == "__main__":
    main()
