"""Several processes train one student: together they do what one process does, stop at one step and fail as one.

None of them waits for one that has failed, and the last step that all completed is saved.
"""

import contextlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from student_fakes import TEACHER, FakeSource, tiny_config

from student import AlignConfig, ConfigError, NonFiniteLossError, RunError, Student
from student.devices import distributed
from student.devices.distributed import processes, rank, world_size
from student.files.checkpoint import latest_checkpoint, load_backbone
from student.run.probing import Probe
from student.run.trainer import Trainer

OPTIM = replace(tiny_config().optim, base_lr=1e-3, clip_grad=1.0, ema=0.9)
CONFIG = tiny_config(optim=OPTIM, batch_size=8, accumulate=2)
ALIGN = replace(CONFIG, objectives=(AlignConfig(levels=2),))


def trainer(out: Path, config=CONFIG, before=lambda step, index: None, **options) -> Trainer:
    student = Student(config, (TEACHER,))
    source = FakeSource(config, student.needs, before=before, rank=rank(), world=world_size())
    return Trainer(config, student, source, out, **options)


def one_of_two(place: int, folder: str) -> None:
    """Everything that is asked of two processes, because starting them takes seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(place), "WORLD_SIZE": "2", "LOCAL_RANK": str(place), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": Path(folder, "port").read_text().split()[0]}  # fmt: skip
    folder, seen = Path(folder), {}
    with processes("cpu") as device:
        assert (device, rank(), world_size()) == ("cpu", place, 2)
        trainer(folder / "two").fit()
        trainer(folder / "align", ALIGN).fit(max_steps=3)
        asked = []
        probe = Probe(lambda encoder: asked.append(rank()) or {"name": "any", "main": "a", "values": {"a": torch.rand(1).item()}})
        trainer(folder / "probed", probe=probe).fit()
        seen["probes"] = asked

        def interrupt(step, index):
            if place == 1 and (step, index) == (3, 1):
                os.kill(os.getpid(), signal.SIGINT)

        stopped = trainer(folder / "stopped", before=interrupt)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
        seen["stopped"] = stopped.step
        trainer(folder / "stopped").fit()

        broken = trainer(folder / "broken")
        micro_batches = broken.source.micro_batches

        def with_nan(first, last):
            for number, batch in enumerate(micro_batches(first, last)):
                yield replace(batch, images=batch.images * float("nan")) if (place, number) == (1, 5) else batch

        broken.source.micro_batches = with_nan
        with pytest.raises(NonFiniteLossError) as error:
            broken.fit()
        seen["broken"] = [error.value.step, list(error.value.rows)]
        trainer(folder / "broken").fit(max_steps=3)  # they still hear each other
        with pytest.raises(ConfigError, match="accumulate=2 and 2 processes. Take a multiple of 4"):
            trainer(folder / "odd", replace(CONFIG, batch_size=6))
    for how, port in (("a damaged row", 1), ("full", 2)):
        seen[how] = failing(folder, place, how, port)
    (folder / f"{place}.json").write_text(json.dumps(seen))


def failing(folder: Path, place: int, how: str, port: int) -> list[str]:
    """Process 1 meets a damaged row or a full device in step 4, process 0 does not: type and message of what each raised."""
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text().split()[port]
    with pytest.raises(Exception) as caught, processes("cpu"):  # noqa: B017  (another in each process)
        run = trainer(folder / how)
        if place == 1 and how == "full":
            encode = run.student.backbone.forward

            def out_of_memory(images, mask):
                if run.step == 3:
                    raise torch.OutOfMemoryError("full")
                return encode(images, mask)

            run.student.backbone.forward = out_of_memory
        elif place == 1:

            def damaged(step, index):
                if (step, index) == (3, 1):
                    raise RunError(how)

            run.source.before = damaged
        run.fit()
    return [type(caught.value).__name__, str(caught.value), *getattr(caught.value, "__notes__", ())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import socket

    folder = tmp_path_factory.mktemp("processes")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        (folder / "port").write_text(" ".join(str(one.getsockname()[1]) for one in free))
    mp.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(run))


@pytest.mark.parametrize("micro_batch", [8, 4, 2])
@pytest.mark.parametrize("name, config, steps", [("two", CONFIG, None), ("align", ALIGN, 3)])
def test_two_processes_equal_one(folder, tmp_path, name, config, steps, micro_batch):
    """Weights, moments and averages after a run of two processes are those of one process, whatever its device holds at once;
    so are the logged losses. Drop path is on."""
    student = Student(config, (TEACHER,))
    source = FakeSource(config, student.needs, accumulate=8 // micro_batch)
    Trainer(config, student, source, tmp_path / "one", micro_batch=micro_batch).fit(max_steps=steps)
    one, two = weights(tmp_path / "one"), weights(folder / name)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-5, rtol=2e-3, msg=key)
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "one", folder / name)
    ]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-4)


def test_they_stop_at_one_step(folder):
    """A signal to one process stops both after the step under way, with a checkpoint from which the run goes on as ever."""
    seen = [json.loads((folder / f"{place}.json").read_text()) for place in (0, 1)]
    assert [one["stopped"] for one in seen] == [4, 4]
    undisturbed, resumed = weights(folder / "two"), weights(folder / "stopped")
    for key, tensor in undisturbed.items():
        assert torch.equal(resumed[key], tensor), key


def test_one_of_them_asks_the_probe(folder):
    """Process 0 alone asks, at the begin and behind both epochs; the run stays the same, bit for bit."""
    assert [json.loads((folder / f"{place}.json").read_text())["probes"] for place in (0, 1)] == [[0, 0, 0], []]
    undisturbed, probed = weights(folder / "two"), weights(folder / "probed")
    assert all(torch.equal(probed[key], tensor) for key, tensor in undisturbed.items())


def test_they_fail_as_one(folder):
    """A broken loss in one process stops both before the step, with the rows of its micro-batch."""
    for place in (0, 1):
        step, rows = json.loads((folder / f"{place}.json").read_text())["broken"]
        assert (step, rows) == (3, [22, 23])  # micro-batch 5 of process 1: step 3 has rows 16 to 23


@pytest.mark.parametrize("how, name", [("a damaged row", "RunError"), ("full", "OutOfMemoryError")])
def test_nobody_waits_for_one_that_failed(folder, how, name):
    """Where one process fails, in its data or its forward pass, the other stops at once with the reason; the last step that both
    completed is saved."""
    first, second = (json.loads((folder / f"{place}.json").read_text())[how] for place in (0, 1))
    assert second == [name, how]
    assert first[:2] == ["PeerFailedError", f"Process 1 of this run failed: {how}"]
    assert first[2].startswith("Step 3 is saved; the same command goes on from there. ")
    assert latest_checkpoint(folder / how).name == "checkpoint-00000003.safetensors"
    record = json.loads((folder / how / "failed-00000004.json").read_text())
    assert (record["process"], record["processes"], record["step"]) == (1, 2, 4)


def test_average_by_hand(tmp_path):
    """The average is decay * average + (1 - decay) * weights after every step, and is what `averaged` loads."""
    config = replace(CONFIG, optim=replace(OPTIM, ema=0.5))
    run = trainer(tmp_path / "run", config)
    expected = run.student.backbone.norm.weight.detach().clone()

    def follow(report):
        nonlocal expected
        expected = 0.5 * expected + 0.5 * run.student.backbone.norm.weight.detach()

    run.on_step = follow
    run.fit(max_steps=3)
    last, averaged = (load_backbone(latest_checkpoint(tmp_path / "run"), averaged)[0].norm.weight for averaged in (False, True))
    torch.testing.assert_close(averaged, expected)
    assert torch.equal(last, run.student.backbone.norm.weight) and not torch.equal(last, averaged)


def test_compiled_equals_eager(tmp_path, monkeypatch):
    """A compiled run takes the same steps; its checkpoints have the same names."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    student = Student(CONFIG, (TEACHER,))
    Trainer(CONFIG, student, FakeSource(CONFIG, student.needs), tmp_path / "compiled", compiled=True).fit(max_steps=2)
    trainer(tmp_path / "eager").fit(max_steps=2)
    compiled, eager = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert compiled.keys() == eager.keys()
    for key, tensor in eager.items():
        torch.testing.assert_close(compiled[key], tensor, atol=1e-5, rtol=1e-3, msg=key)


def test_a_sum_over_processes_is_part_of_one_graph(monkeypatch):
    """What a loss sums over all processes can be compiled as one graph, forward and backward."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        values = torch.arange(3.0, requires_grad=True)
        torch.compile(lambda x: distributed.summed(x * 2).sum(), fullgraph=True, backend="aot_eager")(values).backward()
        assert values.grad.tolist() == [2, 2, 2]
    finally:
        torch.distributed.destroy_process_group()
