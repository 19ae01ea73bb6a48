"""The loop of fine-tuning: each step is a function of its position, so that one that goes on is one that was not stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from teacher_cache.errors import BadInputError

from ...devices.distributed import barrier, rank, sharing_gradients, summed, world_size
from ...errors import ConfigError, NonFiniteLossError
from ...seeds import position_seed
from ..watch import Watch, unwatched
from . import saved
from .augmented import Augmented, collate, leave_signals_alone, mixer, seeded, transform_of
from .classifier import Classifier
from .settings import FineTune

BETAS = (0.9, 0.999)


@dataclass
class FineTuning:
    """One fine-tuning, in all processes of a run.

    train: TrainImages with `fingerprint`.  val: iterates (images, labels) and has `part`.  folder: where its state is kept.
    accumulate: micro-batches that a process takes in a step.  say: told each epoch.
    """

    classifier: Classifier
    train: object
    val: object
    settings: FineTune
    n_classes: int
    folder: Path
    identity: dict
    seed: int = 0
    device: str | torch.device = "cpu"
    precision: str = "fp32"
    accumulate: int = 1
    workers: int = 0
    say: Callable[[str], None] = lambda line: None
    watch: Watch = unwatched

    def __post_init__(self):
        self.device = torch.device(self.device)
        parts = world_size() * self.accumulate
        self.batch_size = min(self.settings.batch_size, len(self.train))
        if self.batch_size < self.settings.batch_size:
            self.batch_size -= self.batch_size % (2 * parts)
        micro = self.batch_size / parts
        if micro != int(micro) or micro < 1 or self.settings.mixes and micro % 2:
            raise ConfigError(
                f"A batch of {self.batch_size} images cannot be cut into {parts} parts of an even number of images. Give another "
                "--set batch_size= or --accumulate."
            )
        self.micro, self.steps = int(micro), len(self.train) // self.batch_size

    def run(self) -> list[dict]:
        """Train, or go on; what each epoch gave: {"epoch", "loss", "top1", "top5", "rate"}, accuracies in 0..1."""
        model = self.classifier.to(self.device)
        optimizer = torch.optim.AdamW(model.groups(self.settings), lr=0.0, betas=BETAS)
        epochs = saved.resume(self.folder, model, optimizer, self.identity)
        if epochs:
            self.say(f"resumed behind epoch {len(epochs)} of {self.settings.epochs}")
        forward = sharing_gradients(model, self.device)
        for epoch in range(len(epochs), self.settings.epochs):
            loss, rate = self._epoch(forward, optimizer, epoch)
            top1, top5 = self.accuracy(model)
            epochs.append({"epoch": epoch + 1, "loss": loss, "top1": top1, "top5": top5, "rate": rate})
            if rank() == 0:
                saved.save(self.folder, model, optimizer, self.identity, epochs)
            barrier()
            self.say(f"epoch {epoch + 1} of {self.settings.epochs}: loss {loss:.4f}, {top1:.2%} right")
        return epochs

    def _epoch(self, forward, optimizer, epoch: int) -> tuple[float, float]:
        """(mean loss, learning rate of the last step)."""
        mix, losses, rate = mixer(self.settings, self.n_classes), [], 0.0
        forward.train()
        batches = iter(self._batches(epoch))
        with self.watch(f"finetune, epoch {epoch + 1}", self.steps * self.batch_size, "images") as advance:
            for step in range(self.steps):
                rate = self.settings.rate_at(epoch + step / self.steps, self.batch_size)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                total = torch.zeros((), device=self.device)
                for index in range(self.accumulate):
                    batch = next(batches)
                    if isinstance(batch, BadInputError):
                        raise batch
                    images, labels = batch
                    with seeded("finetune step", self.seed, epoch, step, index, rank()):
                        loss = self._loss(forward, images.to(self.device), labels.to(self.device), mix) / self.accumulate
                        loss.backward()
                    total += loss.detach()
                value = float(summed(total)) / world_size()
                if not math.isfinite(value):
                    raise NonFiniteLossError(
                        f"The loss of step {step + 1} of epoch {epoch + 1} is {value}. The state behind epoch {epoch} is kept; "
                        "give a lower --set base_rate= and another --out.", step + 1, ()
                    )  # fmt: skip
                optimizer.step()
                optimizer.zero_grad()
                losses.append(value)
                advance(self.batch_size)
        return sum(losses) / len(losses), rate

    def _loss(self, forward, images: Tensor, labels: Tensor, mix) -> Tensor:
        targets = labels
        if mix is not None:
            images, targets = mix(images, labels)
        with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
            logits = forward(images)
        smoothing = 0.0 if mix is not None else self.settings.smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def _batches(self, epoch: int) -> DataLoader:
        """This process's micro-batches of an epoch, in order."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(
            position_seed("finetune order", self.seed, epoch)))  # fmt: skip
        places = []
        for step in range(self.steps):
            of_step = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            for index in range(self.accumulate):
                first = (index * world_size() + rank()) * self.micro
                places.append([(epoch, row) for row in of_step[first : first + self.micro]])
        images = Augmented(self.train, transform_of(self.settings, self.train.size, self.train.mean, self.train.std), self.seed)
        return DataLoader(images, batch_sampler=places, num_workers=self.workers, collate_fn=collate,
                          worker_init_fn=leave_signals_alone)  # fmt: skip

    @torch.no_grad()
    def accuracy(self, model: Classifier) -> tuple[float, float]:
        """(top-1, top-5) on the validation images, in 0..1."""
        model.eval()
        right = torch.zeros(3, dtype=torch.float64, device=self.device)
        for images, labels in self._own_part():
            with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
                logits = model(images.to(self.device)).float()
            n_best = min(5, self.n_classes)
            hits = logits.topk(n_best, dim=1).indices == labels.to(self.device)[:, None]
            right += torch.stack([hits[:, :1].sum(), hits.sum(), torch.tensor(len(labels), device=self.device)])
        first, five, n = summed(right).tolist()
        return first / n, five / n

    def _own_part(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.val.part(rank(), world_size()) if world_size() > 1 else self.val)
