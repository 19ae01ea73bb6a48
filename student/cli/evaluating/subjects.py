"""From WHAT on the command line to what is measured: a run, an exported file, a teacher or model of timm, random weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.errors import UsageError
from teacher_cache.teachers import OPEN_CLIP_PREFIX, TEACHERS, TIMM_PREFIX

RANDOM = "random"


@dataclass(frozen=True)
class Resolver:
    """Turns words into subjects, on `device`."""

    weights: tuple[str, ...] = ()
    """Of --weights: PATH for the only teacher, or NAME=PATH."""
    like: str | None = None
    """Whose architecture `random` has: a preset, a run, or timm:NAME."""
    averaged: bool = False
    device: str = "cpu"
    precision: str = "fp32"
    whats: tuple[str, ...] = ()
    """All that are asked for."""

    def __post_init__(self):
        teachers = [what for what in self.whats if is_teacher(what)]
        for given in self.weights:
            name, sign, _ = given.partition("=")
            if sign and name in teachers:
                continue
            if len(teachers) != 1:
                names = f"{', '.join(teachers)} are asked for" if teachers else "none is asked for"
                raise UsageError(f"--weights {given}: which teacher is it of? ({names}.) Give --weights NAME=PATH.")
        if self.averaged and not any(Path(what).exists() for what in self.whats):
            raise UsageError("--averaged is about runs, and none is asked for. Leave it out.")

    def subject(self, what: str):
        """The student.evals.Subject of these words. Raises UsageError where nothing answers to them, and what loading raises."""
        if what == RANDOM or what.startswith(f"{RANDOM}:"):
            return self._random(what)
        if is_teacher(what):
            return self._timm(what) if what.startswith(TIMM_PREFIX) else self._teacher(what)
        path = Path(what)
        return self._exported(path) if _is_export(path) else self._run(path)

    def _run(self, path: Path):
        from ...files.checkpoint import latest_checkpoint, load_backbone, recorded_description
        from ...modules.pixels import PIXELS

        checkpoint = path if _is_checkpoint(path) and path.is_file() else latest_checkpoint(path)
        if checkpoint is None:
            raise UsageError(
                f"{path} holds no checkpoint. Give the --out folder of a student-train run, an exported file, timm:NAME, a "
                f"teacher ({', '.join(TEACHERS)}) or {RANDOM}."
            )
        backbone, config = load_backbone(checkpoint, self.averaged)
        pixels = recorded_description(checkpoint).pixels or PIXELS
        about = f"{config.preset}, {checkpoint.name}{', averaged' if self.averaged else ''}"
        subject = self._of_backbone(str(path), about, backbone, config.backbone, pixels, config.preset)
        return dataclasses.replace(subject, checkpoint=str(checkpoint))

    def _exported(self, path: Path):
        from ...exports.reading import load_exported
        from ...modules.pixels import PIXELS

        backbone, record = load_exported(path)
        preset = str(record.made_from.get("preset") or "")
        about = f"export of {preset or 'a student'}"
        return self._of_backbone(str(path), about, backbone, record.config, record.pixels or PIXELS, preset)

    def _of_backbone(self, name: str, about: str, backbone, config, pixels: dict, preset: str = ""):
        from ...evals.subject import Subject, fingerprint

        backbone.grid = getattr(backbone, "grid", config.grid)
        words = json.dumps({"kind": config.kind, **dataclasses.asdict(config)}, sort_keys=True)
        sha256 = fingerprint(words, backbone)
        return Subject(name, about, sha256, backbone.eval().to(self.device), config.image_size, tuple(pixels["mean"]),
                       tuple(pixels["std"]), preset)  # fmt: skip

    def _weights_of(self, name: str) -> str | None:
        for given in self.weights:
            word, sign, path = given.partition("=")
            if sign and word == name:
                return path
        return next((given for given in self.weights if given.partition("=")[0] not in self.whats), None)

    def _load_teacher(self, name: str):
        from teacher_cache.teachers import load_teacher

        return load_teacher(name, self._weights_of(name), device=self.device, precision=self.precision)

    def _teacher(self, name: str):
        from ...evals.subject import Subject, TeacherEncoder

        teacher = self._load_teacher(name)
        spec = teacher.spec
        sha256 = hashlib.sha256(json.dumps(dataclasses.asdict(spec), sort_keys=True).encode()).hexdigest()
        about = f"teacher, weights {spec.weights}"
        return Subject(name, about, sha256, TeacherEncoder(teacher), spec.image_size, spec.mean, spec.std)

    def _timm(self, name: str):
        from ...evals.subject import Subject, TimmEncoder, fingerprint

        teacher = self._load_teacher(name)
        spec, model = teacher.spec, teacher.network
        encoder = TimmEncoder(model.cpu(), spec.image_size).to(self.device).eval()
        words = f"{name} {spec.image_size}"
        return Subject(
            name, f"timm, weights {spec.weights}", fingerprint(words, model), encoder, spec.image_size, spec.mean, spec.std
        )

    def _random(self, what: str):
        import torch

        seed = _seed_of(what)
        like = self.like or next((w for w in self.whats if Path(w).exists()), None)
        if like is None:
            raise UsageError(f"{what}: of which architecture? Add --like PRESET, --like RUN or --like timm:NAME.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if like.startswith(TIMM_PREFIX):
                return self._random_timm(what, like)
            from pipelines.presets import recipe

            from ...files.checkpoint import latest_checkpoint, load_backbone
            from ...modules.backbones import build_backbone
            from ...modules.pixels import PIXELS

            checkpoint = latest_checkpoint(like)
            config = load_backbone(checkpoint)[1].backbone if checkpoint else recipe(like).config.backbone
            torch.manual_seed(seed)
            return self._of_backbone(what, f"random weights, as {like}", build_backbone(config), config, PIXELS)

    def _random_timm(self, what: str, like: str):
        import timm

        from ...evals.subject import Subject, TimmEncoder, fingerprint

        name = like.removeprefix(TIMM_PREFIX)
        if not timm.is_model(name):
            raise UsageError(f"--like {like}: timm has no model of that name.")
        model = timm.create_model(name, num_classes=0)
        size, pixels = model.pretrained_cfg["input_size"][-1], model.pretrained_cfg
        encoder = TimmEncoder(model, size).to(self.device).eval()
        sha256 = fingerprint(f"{like} {size}", model)
        return Subject(what, f"random weights, as {like}", sha256, encoder, size, tuple(pixels["mean"]), tuple(pixels["std"]))


def is_teacher(what: str) -> bool:
    """Whether these words name a teacher; a file or folder of that name comes first."""
    return not Path(what).exists() and (what in TEACHERS or what.startswith((TIMM_PREFIX, OPEN_CLIP_PREFIX)))


def _seed_of(what: str) -> int:
    seed = what.removeprefix(RANDOM).removeprefix(":") or "0"
    if not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
        raise UsageError(f"{what}: the seed must be a whole number from 0, as in random:1.")
    return int(seed)


def _is_export(path: Path) -> bool:
    """Whether the reader of exports is asked: a file that is no checkpoint by its name, or a folder in Hugging Face's layout."""
    from ...exports.weight_files import HF_WEIGHTS

    return path.is_file() and not _is_checkpoint(path) or (path / HF_WEIGHTS).exists()


def _is_checkpoint(path: Path) -> bool:
    from ...files.checkpoint import CHECKPOINT

    return CHECKPOINT.fullmatch(path.name) is not None
