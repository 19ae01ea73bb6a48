"""The loop of every evaluation: subjects, their features, seeds, records, and what is printed of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import click

from teacher_cache.errors import UsageError
from teacher_cache.terminal.command import one_line_errors, say
from teacher_cache.terminal.progress import progress

from ...errors import StudentError
from ..options import COMMAND_AT_FAULT
from .options import Options, features_folder
from .subjects import Resolver

RESUME = "Features and records that are finished are kept; the same command goes on with them."


@contextmanager
def ending() -> Iterator[None]:
    """How an evaluation ends, whatever happens."""
    with one_line_errors(RESUME, COMMAND_AT_FAULT, (StudentError,)):
        yield


class Job:
    """One call of student-eval."""

    def __init__(self, options: Options):
        from teacher_cache.device import pick_device

        self.options = options
        self.device, self.precision = pick_device(options.device, options.precision)
        self.records: list[dict] = []
        self.resolver = Resolver(options.weights, options.like, options.averaged, self.device, self.precision, options.whats)

    @cached_property
    def store(self):
        from ...evals.feature_store import FeatureStore

        return FeatureStore(features_folder(self.options), say)

    def subjects(self) -> Iterator[tuple]:
        """(subject, moment it was begun with), one after the other."""
        for what in self.options.whats:
            began = time.monotonic()
            yield self.resolver.subject(what), began

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show what was found when the block ends; of a block that fails, what was found until then, but for --json."""
        try:
            yield
        except BaseException:
            if self.records and not self.options.as_json:
                self.show()
            raise
        self.show()

    def images(self, path: Path, subject, need_labels: bool = True):
        from pipelines.feed.labelled import LabelledImages

        return LabelledImages(path, subject.image_size, mean=subject.mean, std=subject.std, need_labels=need_labels)

    def readouts(self, subject) -> tuple[str, ...]:
        wanted = self.options.readouts or subject.readouts
        if odd := set(wanted) - set(subject.readouts):
            raise UsageError(f"--readout {odd.pop()}: {subject.name} ({subject.about}) has no CLS token. Give --readout mean.")
        return wanted

    def features(self, subject, images, readouts, encode=None, seen: str = "all patches"):
        """({readout: tensor}, labels) on the CPU."""
        from ...evals.feature_store import frozen_features

        of = ("features", images.path.name or str(images.path), subject.name)
        return frozen_features(subject, images, self.store, readouts, self.device, self.precision,
                               lambda what, total, unit: progress(" ".join(of), total, unit), encode, seen)  # fmt: skip

    def measure_frozen(self, evaluator, encode_of: Callable | None = None, extra: str = "", name: str = "") -> None:
        """Measure every subject with an evaluator of labelled features, and show what was found.

        encode_of: subject -> (way from images to tokens, its name in the key).  extra: behind the protocol.  name: of the
        evaluator in records, if not its own.
        """
        from ...evals.frozen.draws import balanced_share
        from ...evals.frozen.protocol import Labelled
        from ...evals.records import summed_up

        options = self.options
        if options.n_seeds > 1 and not evaluator.draws and options.share == 1:
            raise UsageError(
                f"--seeds {options.n_seeds}: {evaluator.name} draws nothing without --share. Leave it out, or give both."
            )
        with self.showing():
            for subject, began in self.subjects():
                train, val = self.images(options.train, subject), self.images(options.val, subject)
                n_classes = len(train.classes)
                train.only(val.classes)
                encode, seen = encode_of(subject) if encode_of else (None, "all patches")
                readouts, told = self.readouts(subject), told_of_both(train, val, n_classes)
                (voters, labels), (asked, val_labels) = (self.features(subject, i, readouts, encode, seen) for i in (train, val))
                for readout in readouts:
                    every = Labelled(voters[readout].to(self.device), labels.to(self.device))
                    test, by_seed = Labelled(asked[readout].to(self.device), val_labels.to(self.device)), []
                    for seed in range(options.n_seeds):
                        some = every if options.share == 1 else every.rows(balanced_share(labels, options.share, seed))
                        by_seed.append(dict(evaluator.score(some, test, seed, progress)))
                    data = {**told, "used": len(some)}
                    protocol, results = evaluator.protocol + extra, summed_up(by_seed)
                    self.add(name or evaluator.name, protocol, evaluator.main, subject, readout, val.decoder, data, results,
                             evaluator.numbers, began)  # fmt: skip

    def add(self, name, protocol, main, subject, readout, decoder, data, results, numbers, began) -> None:
        """Put a result on record, in the file of --record too."""
        import timm
        import torch

        from ...evals.records import FORMAT, append
        from ...evals.subject import LAYER

        options = self.options
        if main not in results:  # kNN with fewer images than neighbours
            main = list(results)[-1]
        record = {
            "format": FORMAT, "evaluator": name, "protocol": protocol, "what": subject.name, "about": subject.about,
            "checkpoint": subject.checkpoint,
            "weights": subject.weights, "readout": readout, "layer": LAYER, "image_size": subject.image_size, "decoder": decoder,
            "precision": self.precision, "data": data, "share": options.share, "seeds": list(range(options.n_seeds)),
            "main": main, "numbers": list(numbers), "results": results, "seconds": round(time.monotonic() - began, 1),
            "made_by": {"torch": torch.__version__, "timm": timm.__version__},
        }  # fmt: skip
        self.records.append(record)
        if options.record:
            append(options.record, [record])

    def show(self) -> None:
        """Print what was found, as a table or as JSON."""
        from ...evals.records import groups

        if self.options.as_json:
            click.echo(json.dumps({"records": self.records, **_as_before(self.records)}))
            return
        for group in groups(self.records):
            click.echo(table_of(group))


def told_of(images) -> dict:
    return {"fingerprint": images.fingerprint(), "images": len(images), "name": str(images.path)}


def told_of_both(train, val, of_classes: int) -> dict:
    """What records say of the images. of_classes: how many classes those of --train had before they became those of --val."""
    return {"train": told_of(train), "val": told_of(val), "classes": len(val.classes), "of_classes": of_classes}


def _as_before(records: list[dict]) -> dict:
    """Of a single subject: what `knn --json` always had."""
    if len({record["what"] for record in records}) != 1:
        return {}
    data = records[0]["data"]
    accuracy = {
        f"{record['evaluator']}/{record['readout']}/{name}": result["mean"]
        for record in records
        for name, result in record["results"].items()
    }
    found = {"checkpoint": records[0]["checkpoint"], "accuracy": accuracy, "n_val": data["val"]["images"]}
    if "classes" in data:
        found |= {"n_train": data["train"]["images"], "n_classes": data["classes"]}
    return found


def table_of(group: list[dict]) -> str:
    """Records that can be compared, as text, the best first."""
    from rich.console import Console
    from rich.table import Table

    from ...evals.records import cell, columns, title

    names = columns(group)
    made = Table()
    for column, side in (("", "left"), ("token", "left"), *((name, "right") for name in names)):
        made.add_column(column, justify=side, no_wrap=column != "")
    for record in group:
        made.add_row(f"{record['what']} ({record['about']})" if record["about"] else record["what"], record["readout"],
                     *(cell(record, name) for name in names))  # fmt: skip
    console = Console(width=120)
    with console.capture() as capture:
        console.print(made)
    return f"{title(group)}\n{capture.get()}"
