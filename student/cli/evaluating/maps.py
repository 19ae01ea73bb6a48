"""student-eval attention, semantic-probe, rank: what an encoder looks at, what it sees by that alone, how many axes it uses."""

from __future__ import annotations

import click

from teacher_cache.errors import UsageError
from teacher_cache.terminal.progress import progress

from .frozen import TRAIN, VAL
from .job import Job, ending, told_of
from .options import Options, measuring, numbers

TEACHER = click.option("--teacher", required=True, help="Whose attention counts: a teacher by its name, timm:NAME, or a run.")
TEACHER_WEIGHTS = click.option("--teacher-weights", help="PATH or random:SEED of its weights, as for teacher-cache extract.")


def _teacher(job: Job, name: str, weights: str | None):
    """The subject of --teacher."""
    from .subjects import Resolver, is_teacher

    if weights and not is_teacher(name):
        raise UsageError(f"--teacher-weights {weights}: --teacher {name} is no teacher by name. Leave it out.")
    given = (weights,) if weights else ()
    return Resolver(given, device=job.device, precision=job.precision, whats=(name,)).subject(name)


@click.command("semantic-probe")
@measuring(TRAIN, VAL, readouts=True, draws=True)
@TEACHER
@TEACHER_WEIGHTS
@click.option("--visible", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="Share of the patches that is seen. (MILAN's code: .7.)")  # fmt: skip
@click.option("--rates", help="As of student-eval linear.")
def semantic_probe(options: Options, teacher: str, teacher_weights: str | None, visible: float, rates: str | None):
    """A linear classifier on features of the patches that a teacher attends to most, by MILAN's protocol.

    In training and in the test the encoder sees half of the patches: those of the highest CLS attention of the teacher. The
    classifier is that of student-eval linear.

    \b
    Example:
      student-eval semantic-probe runs/a --teacher clip-b16 --teacher-weights ViT-B-16.pt --train in1k/train --val in1k/val
    """
    with ending():
        from ...evals import LinearProbe
        from ...evals.semantic import seeing_most_attended

        job = Job(options)
        looks = _teacher(job, teacher, teacher_weights)
        settings = {"rates": numbers("--rates", rates, float)} if rates else {}
        seen = f"{visible:g} of the patches by attention of {looks.weights}"
        job.measure_frozen(
            LinearProbe(**settings),
            lambda subject: (seeing_most_attended(subject, looks, visible), seen),
            f", seeing {visible:g} of the patches by attention of {teacher} ({looks.weights[:12]}; MILAN)",
            name="semantic-probe",
        )


@click.command()
@measuring(val="Images that are looked at: a folder, with or without class folders, or a cache.")
@TEACHER
@TEACHER_WEIGHTS
def attention(options: Options, teacher: str, teacher_weights: str | None):
    """How far the CLS attention of an encoder falls on the patches that a teacher attends to, in the last block of both.

    overlap: common mass of both maps; top: of the quarter of patches that the teacher attends to most, the part that is among the
    encoder's (a quarter, by chance); rank: Spearman's correlation.

    \b
    Example:
      student-eval attention runs/a random --teacher clip-b16 --teacher-weights ViT-B-16.pt --val imagenet/val
    """
    with ending():
        import torch

        from ...errors import ConfigError
        from ...evals.attention import SHARE, overlap, rank_correlation, top_overlap
        from ...evals.records import summed_up
        from ...evals.semantic import renormalised

        job = Job(options)
        looks = _teacher(job, teacher, teacher_weights)
        with job.showing(), torch.no_grad():
            for subject, began in job.subjects():
                if tuple(subject.encoder.grid) != tuple(looks.encoder.grid):
                    grids = f"{subject.encoder.grid} patches, {teacher} has {looks.encoder.grid}"
                    raise ConfigError(f"{subject.name} has {grids}: their maps cannot be laid over each other.")
                images, found = job.images(options.val, subject, need_labels=False), []
                with progress(f"attention {subject.name}", len(images), "images") as advance:
                    for batch, _ in images:
                        batch = batch.to(job.device)
                        ours, theirs = subject.attention(batch), looks.attention(renormalised(batch, subject, looks))
                        of = (overlap, top_overlap, rank_correlation)
                        found.append(torch.stack([measure(ours, theirs).double() for measure in of], 1).cpu())
                        advance(len(batch))
                means = torch.cat(found).mean(0).tolist()
                results = summed_up([dict(zip(("overlap", "top", "rank"), means, strict=True))])
                beside = f"beside {teacher} ({looks.weights[:12]})"
                protocol = f"attention: CLS to patches, last block, mean over heads, {beside}; top {SHARE:g}"
                data = {"val": told_of(images)}
                job.add("attention", protocol, "overlap", subject, "cls", images.decoder, data, results, ("rank",), began)


@click.command()
@measuring(val="Images: a folder, with or without class folders, or a cache.", readouts=True)
def rank(options: Options):
    """RankMe of frozen features: exp of the entropy of their singular values, at most their width.

    It falls where a representation has collapsed. Singular values are reported with --json. Give several thousand images: fewer
    than the width bound it.

    \b
    Example:
      student-eval rank runs/a random --val imagenet/val
    """
    with ending():
        from ...evals.rank import rankme, singular_values
        from ...evals.records import summed_up

        job = Job(options)
        with job.showing():
            for subject, began in job.subjects():
                images = job.images(options.val, subject, need_labels=False)
                readouts, data = job.readouts(subject), {"val": told_of(images)}
                features, _ = job.features(subject, images, readouts)
                for readout in readouts:
                    values = singular_values(features[readout].to(job.device)).cpu()
                    results = {"rankme": rankme(values), "width": float(features[readout].shape[1])}
                    results |= {f"at {number}": float(value) for number, value in enumerate(values, 1)}
                    job.add("rank", "rank (RankMe): singular values, not centred", "rankme", subject, readout, images.decoder,
                            data, summed_up([results]), tuple(results), began)  # fmt: skip
