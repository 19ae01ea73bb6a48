"""MimCo's losses, queues and key projectors, by hand and over two processes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from student_fakes import TEACHER, fake_batch

from student import ConfigError, ContrastConfig, MaskConfig, Needs, OptimConfig, Student, TrainConfig, ViTConfig
from student.masking import draw_noise
from student.modules.backbones import Encoded
from student.modules.batch_norm import BatchNorm
from student.modules.objectives.contrast import Branch, Contrast

BACKBONE = ViTConfig(image_size=16, patch_size=4, dim=12, depth=1, heads=2, hidden="mask-token")
CONFIG = ContrastConfig(hidden_dim=16, out_dim=8, queue=8, momentum=0.9)


def train_config(**changes) -> TrainConfig:
    values = {"backbone": BACKBONE, "mask": MaskConfig("unit", 0.5, unit=8), "objectives": (CONFIG,), "batch_size": 4,
              "optim": OptimConfig(warmup_epochs=1.0), "epochs": 2, "teachers": ("fake",)}  # fmt: skip
    return TrainConfig(**{**values, **changes})


def head_by_hand(head, x: np.ndarray) -> np.ndarray:
    """Linear, batch norm by the statistics of all rows, ReLU, Linear; float64 [n, in] -> [n, out]."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in head.state_dict().items()}
    hidden = x @ weights["hidden.weight"].T + weights["hidden.bias"]
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    return np.maximum(hidden, 0) @ weights["out.weight"].T + weights["out.bias"]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_loss_by_hand():
    """Both losses are MoBY's InfoNCE, written out with numpy: hidden patches, and the mean over patches."""
    torch.manual_seed(0)
    contrast, batch = Contrast(CONFIG, BACKBONE, (TEACHER,)), fake_batch(range(3), layers=(-1,))
    masker = Student(train_config(), (TEACHER,)).masker
    mask = masker(batch, draw_noise(0, 0, 3, 16))
    tokens = torch.randn(3, 17, 12)
    loss, parts = contrast(Encoded(tokens, (tokens,)), batch, mask)

    student, teacher = tokens[:, 1:].double().numpy(), batch.targets[0].patches(-1).double().numpy()
    student_rows, teacher_rows = student.reshape(-1, 12), teacher.reshape(-1, 12)
    expected = {}
    for name, branch, queries, keys in (
        ("patch", contrast.patch, student_rows, teacher_rows),
        ("image", contrast.image, student.mean(1), teacher.mean(1)),
    ):
        q = unit(head_by_hand(branch.predictor, head_by_hand(branch.projector, queries)))
        k = unit(head_by_hand(branch.key_projector, keys))
        if name == "patch":
            rows = (np.arange(3)[:, None] * 16 + mask.drop.numpy()).ravel()
            q, k = q[rows], k[rows]
        positive = np.exp((q * k).sum(1) / 0.2)
        negative = np.exp(q @ branch.queue.double().numpy().T / 0.2).sum(1)
        expected[name] = -np.log(positive / (positive + negative)).mean()
    assert parts["patch"].item() == pytest.approx(expected["patch"], rel=1e-5)
    assert parts["image"].item() == pytest.approx(expected["image"], rel=1e-5)
    assert loss.item() == pytest.approx(expected["patch"] + expected["image"], rel=1e-5)


def test_gradient_by_hand():
    """The gradient of InfoNCE towards a query is (softmax-weighted keys - its own key) / temperature / number of queries."""
    torch.manual_seed(0)
    branch = Branch(12, CONFIG)
    queries, keys = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    queries.requires_grad_()
    branch.loss(queries, keys).backward()

    q, k, queue = queries.detach().double().numpy(), keys.double().numpy(), branch.queue.double().numpy()
    for i in range(5):
        everything = np.vstack([k[i], queue])
        shares = np.exp(everything @ q[i] / 0.2)
        expected = (shares / shares.sum() @ everything - k[i]) / 0.2 / 5
        np.testing.assert_allclose(queries.grad[i], expected, atol=1e-6)


def test_chance():
    """Queries that know nothing cost ln(1 + K): 8.318 with 4,096 negatives."""
    branch = Branch(12, replace(CONFIG, queue=4096, out_dim=256, temperature=50.0))
    vectors = torch.nn.functional.normalize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    assert branch.loss(vectors, vectors.roll(1, 0)).item() == pytest.approx(math.log(4097), abs=1e-3)
    assert math.log(4097) == pytest.approx(8.318, abs=1e-3)


def test_batch_norm_is_torchs():
    """On one process, values and gradients are those of torch's batch norm in training."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6), torch.nn.BatchNorm1d(6)
    x = torch.randn(10, 6) * 3 + 5
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(10, 6)
    (ours(one) * weights).sum().backward()
    (theirs(two) * weights).sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-4)


def test_queue_replaces_the_oldest():
    """Keys stand in the queue in the order they came, and the oldest go first, around the end."""
    branch = Branch(12, CONFIG)
    before = branch.queue.clone()
    keys = torch.arange(6 * 8).float().reshape(6, 8)
    branch.enqueue(keys)
    assert torch.equal(branch.queue[:6], keys) and torch.equal(branch.queue[6:], before[6:])
    branch.enqueue(-keys)
    assert torch.equal(branch.queue[[6, 7, 0, 1, 2, 3]], -keys) and torch.equal(branch.queue[4:6], keys[4:])


def test_key_projector_follows_by_the_schedule():
    """It starts as the projector, gets no gradient, and its momentum rises from the configured one to 1 by half a cosine."""
    contrast = Contrast(CONFIG, BACKBONE, (TEACHER,))
    branch = contrast.patch
    start = branch.key_projector.out.weight.clone()
    assert torch.equal(start, branch.projector.out.weight)
    assert not any(parameter.requires_grad for parameter in branch.key_projector.parameters())
    with torch.no_grad():
        branch.projector.out.weight += 1
    for step, momentum in ((1, 1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2), (4, 1.0)):
        before = branch.key_projector.out.weight.clone()
        contrast._waiting = [(torch.zeros(4, 8), torch.zeros(4, 8))]
        contrast.after_step(step, 4)
        expected = momentum * before + (1 - momentum) * branch.projector.out.weight
        torch.testing.assert_close(branch.key_projector.out.weight, expected)


def test_what_it_refuses():
    """A teacher of another width, an encoder that drops hidden patches, and a queue that is no multiple of the batch."""
    with pytest.raises(ConfigError, match="equally wide; the student is 16 wide, the teacher fake 12"):
        Contrast(CONFIG, replace(BACKBONE, dim=16), (TEACHER,))
    with pytest.raises(ConfigError, match="mask-token"):
        Contrast(CONFIG, replace(BACKBONE, hidden="dropped"), (TEACHER,))
    with pytest.raises(ConfigError, match="multiple of batch_size=3"):
        train_config(batch_size=3)
    assert Contrast(CONFIG, BACKBONE, (TEACHER,)).needs == Needs((-1,), hidden_tokens=True)


def run(student: Student, optimizer, first_row: int, n_rows: int, step: int, slices: list[slice]) -> float:
    """One step as the trainer makes it, over micro-batches; returns the mean loss."""
    noise, losses = draw_noise(0, step, n_rows, 16), []
    optimizer.zero_grad()
    for part in slices:
        batch = fake_batch(range(first_row + part.start, first_row + part.stop), layers=(-1,))
        loss, _ = student(batch, student.draw_mask(batch, noise[part]))
        (loss / len(slices)).backward()
        losses.append(loss.item())
        student.after_batch()
    for parameter in student.parameters():
        if parameter.grad is not None and torch.distributed.is_initialized():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
    optimizer.step()
    student.after_step(step + 1, 8)
    return sum(losses) / len(losses)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student = Student(train_config(), (TEACHER,))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    losses = [run(student, optimizer, 4 * step, 4, step, [slice(2 * rank, 2 * rank + 2)]) for step in range(3)]
    torch.save({"losses": losses, "state": student.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Two processes with half a batch each keep identical queues and weights, equal to one process with the joined batch."""
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name

    student = Student(train_config(), (TEACHER,))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)  # AdamW would blow up the rounding of gradients that are 0
    losses = [run(student, optimizer, 4 * step, 4, step, [slice(0, 4)]) for step in range(3)]
    halves = np.mean([first["losses"], second["losses"]], axis=0)
    np.testing.assert_allclose(halves, losses, rtol=1e-5)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(first["state"][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert student.objectives["contrast"].patch.oldest == 4  # 12 keys went through a queue of 8


def test_accumulated_queues():
    """Micro-batches see the same negatives as the large batch, and put the same number of keys into the queues, once a step."""
    student = Student(train_config(), (TEACHER,))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    before = student.objectives["contrast"].patch.queue.clone()
    run(student, optimizer, 0, 4, 0, [slice(0, 2), slice(2, 4)])
    contrast = student.objectives["contrast"]
    assert contrast.patch.oldest == 4 and contrast._waiting == []
    assert torch.equal(contrast.patch.queue[4:], before[4:]) and not torch.equal(contrast.patch.queue[:4], before[:4])


def test_compiles_whole():
    """The forward pass with its loss is one graph for torch.compile, and keys still reach the queues."""
    torch._dynamo.reset()
    student = Student(train_config(), (TEACHER,))
    batch = fake_batch(range(4), layers=(-1,))
    mask = student.draw_mask(batch, draw_noise(0, 0, 4, 16))
    expected = student(batch, mask)[0]
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch, mask)[0], expected)
    student.after_batch()
    student.after_step(1, 8)
    assert student.objectives["contrast"].patch.oldest == 4
