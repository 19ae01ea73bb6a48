"""What the quantiser of a store is fitted on: tokens of the first rows of view 0, in bounded memory.

Rows are in random order (images.py), so the first ones are a fair sample. Of most teachers the sample is FIT_ROWS rows of
FIT_TOKENS tokens. Where that would take more than SAMPLE_BYTES (many layers, wide ones), fewer tokens are drawn of each row, and
only where one of each is still too much, fewer rows. Everything else works on a piece at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .quantize import ChannelStatistics, dequantise, quantise, token_errors
from .race import places_of, race
from .spec import ARRAY_NAME, LayerFidelity, StoreSpec, TeacherSpec
from .writer import encoder

FIT_ROWS = 2048
"""Rows of view 0 that the quantiser is fitted on; fewer for small sets, whose extraction they would double."""
FIT_TOKENS = 32
"""Tokens drawn from each of these rows."""
SAMPLE_BYTES = 1_010_000_000
"""Of all tokens drawn: five layers of a ViT-B fit."""
TRIAL_ROWS = 16
"""Whole rows on which codecs are tried."""
TRIAL_BYTES = 50_000_000
"""Of these rows; at least one is taken."""
CODEC_GAIN = 0.15
"""`auto` compresses an array if that saves this share of its bytes."""
PIECE_BYTES = 1 << 20
"""Of the tokens that are looked at at a time; some copies of them stand beside the sample."""
FIT_MEMORY = 1_100_000_000
"""Bytes that the fit takes at most, beside the teacher and its batch: benchmarks/fit_memory.py measures it."""
BESIDE = FIT_MEMORY - SAMPLE_BYTES - TRIAL_BYTES
"""Of these, what is neither sample nor trial."""

# B batch, L layers, T tokens that are kept, D channels


@dataclass(frozen=True)
class FitPlan:
    """How large the sample of a store is."""

    n_rows: int
    n_tokens: int
    """Drawn of each row."""
    n_trial: int
    """Rows that are kept whole; 0 if no codec is tried."""
    n_bytes: int
    """Of memory that the fit takes at most."""

    @classmethod
    def of(cls, spec: StoreSpec, teacher: TeacherSpec, codec: str) -> FitPlan:
        """For the store that is described. codec: as asked for, `auto` is tried out."""
        token_bytes = len(spec.layers) * teacher.dim * 4  # float32
        n_all = spec.n_tokens(teacher)
        n_rows = min(FIT_ROWS, max(TRIAL_ROWS, spec.n_rows // 8), spec.n_rows, max(1, SAMPLE_BYTES // token_bytes))
        n_tokens = min(FIT_TOKENS, n_all, max(1, SAMPLE_BYTES // (token_bytes * n_rows)))
        n_trial = min(TRIAL_ROWS, n_rows, max(1, TRIAL_BYTES // (token_bytes * n_all))) if codec == "auto" else 0
        return cls(n_rows, n_tokens, n_trial, token_bytes * (n_rows * n_tokens + n_trial * n_all) + BESIDE)


class Sample:
    """Tokens drawn for the fit, row by row in ascending order; then what they say."""

    def __init__(self, spec: StoreSpec, teacher: TeacherSpec, codec: str):
        self.spec, self.teacher, self.codec = spec, teacher, codec
        self.plan = FitPlan.of(spec, teacher, codec)
        n_layers = len(spec.layers)
        self.tokens = np.empty((n_layers, self.plan.n_rows * self.plan.n_tokens, teacher.dim), "float32")
        self.trial = np.empty((n_layers, self.plan.n_trial, spec.n_tokens(teacher), teacher.dim), "float32")
        self._draws = np.random.Philox(key=0)

    def places(self, rows: np.ndarray, attention: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Which of the teacher's C+N tokens are wanted of the next rows: int64 [B, drawn], and [b, T] of those kept whole.

        attention: float32 [B, N]; looked at where the store keeps visible tokens alone.
        """
        n_kept = self.spec.n_tokens(self.teacher)
        if self.spec.visible:
            kept = places_of(race(attention, rows, 0, self.spec.visible), int(self.teacher.has_cls)).astype("int64")
        else:
            kept = np.broadcast_to(np.arange(n_kept), (len(rows), n_kept))
        draws = np.stack([np.argsort(self._draws.random_raw(n_kept), kind="stable")[: self.plan.n_tokens] for _ in rows])
        return np.take_along_axis(kept, draws, axis=1), kept[rows < self.plan.n_trial]

    def keep(self, rows: np.ndarray, drawn: np.ndarray, whole: np.ndarray) -> None:
        """Take the tokens at `places`: float32 [B, L, drawn, D] and [b, L, T, D]."""
        n = self.plan.n_tokens
        for row, tokens in zip(rows, drawn, strict=True):
            self.tokens[:, row * n : (row + 1) * n] = tokens
        for row, tokens in zip(rows, whole, strict=False):  # the first rows of all
            self.trial[:, row] = tokens

    def fit(self) -> tuple[dict[int, ChannelStatistics], tuple[LayerFidelity, ...], dict[str, str]]:
        """Channel statistics of each layer (none for float16), its fidelity, and the codec of each row array."""
        spec, statistics, fidelity = self.spec, {}, []
        codecs = dict.fromkeys(spec.array_names, "none" if self.codec == "auto" else self.codec)
        for i, layer in enumerate(spec.layers):
            channel = ChannelStatistics.fit(self.tokens[i])
            if spec.is_quantised:
                statistics[layer] = channel
            errors = np.concatenate([self._errors(piece, channel) for piece in _pieces(self.tokens[i])])
            median, p99 = (float(np.quantile(errors, q)) for q in (0.5, 0.99))
            fidelity.append(LayerFidelity(layer, median, p99, float(errors.max()), len(errors)))
            if self.codec == "auto":
                codecs[ARRAY_NAME.format(layer)] = self._choose_codec(self.trial[i], channel)
        return statistics, tuple(fidelity), codecs

    def _errors(self, tokens: np.ndarray, channel: ChannelStatistics) -> np.ndarray:
        """What storing does to each token of float32 [n, D]: float64 [n]."""
        stored, scale = self._stored(tokens, channel)
        if self.spec.is_quantised:
            return token_errors(tokens, dequantise(stored, scale, channel, self.spec.dtype, self.spec.group), channel)
        return token_errors(tokens, stored.astype("float32"), channel)

    def _stored(self, tokens: np.ndarray, channel: ChannelStatistics) -> tuple[np.ndarray, np.ndarray | None]:
        if not self.spec.is_quantised:
            return tokens.astype("float16"), None
        return quantise(tokens, channel, self.spec.dtype, self.spec.group)

    def _choose_codec(self, rows: np.ndarray, channel: ChannelStatistics) -> str:
        """What `auto` means for stored tokens: zstd if it saves CODEC_GAIN of the bytes of these rows, else none.

        rows: float32 [n, T, D]. Scales and attention are a hundredth of the bytes: compressing them would save nothing and cost
        the compiled read.
        """
        encode, before, after = encoder("zstd"), 0, 0
        for row in rows:
            stored = self._stored(row, channel)[0].tobytes()
            before, after = before + len(stored), after + len(encode(stored))
        return "zstd" if after <= (1 - CODEC_GAIN) * before else "none"


def _pieces(tokens: np.ndarray) -> list[np.ndarray]:
    """float32 [n, D], some tokens at a time."""
    at_a_time = max(1, PIECE_BYTES // (tokens.shape[1] * 4))
    return [tokens[i : i + at_a_time] for i in range(0, len(tokens), at_a_time)]
