"""Several processes train one student: together they do what one process does, stop at one step and fail as one."""

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

from student import AlignConfig, ConfigError, NonFiniteLossError, Student
from student.checkpoint import latest_checkpoint, load_backbone
from student.distributed import processes, rank, world_size
from student.trainer import Trainer

BACKBONE = replace(tiny_config().backbone, drop_path=0.0)  # its draws differ between processes
OPTIM = replace(tiny_config().optim, base_lr=1e-3, clip_grad=1.0, ema=0.9)
CONFIG = tiny_config(backbone=BACKBONE, optim=OPTIM, batch_size=8, accumulate=2)
ALIGN = replace(CONFIG, objectives=(AlignConfig(levels=2),))


def trainer(out: Path, config=CONFIG, before=lambda step, index: None) -> Trainer:
    student = Student(config, (TEACHER,))
    return Trainer(config, student, FakeSource(config, student.needs, before=before, rank=rank(), world=world_size()), out)


def one_of_two(place: int, folder: str) -> None:
    """Everything that is asked of two processes, because starting them takes seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(place), "WORLD_SIZE": "2", "LOCAL_RANK": str(place), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": Path(folder, "port").read_text()}  # fmt: skip
    folder, seen = Path(folder), {}
    with processes("cpu") as device:
        assert (device, rank(), world_size()) == ("cpu", place, 2)
        trainer(folder / "two").fit()
        trainer(folder / "align", ALIGN).fit(max_steps=3)

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
        with pytest.raises(ConfigError, match="accumulate=2 and 2 processes. Take a multiple of 4"):
            trainer(folder / "odd", replace(CONFIG, batch_size=6))
    (folder / f"{place}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import socket

    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    mp.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(run))


@pytest.mark.parametrize("name, config, steps", [("two", CONFIG, None), ("align", ALIGN, 3)])
def test_two_processes_equal_one(folder, tmp_path, name, config, steps):
    """Weights, moments and averages after a run of two processes are those of one process; so are the logged losses."""
    trainer(tmp_path / "one", config).fit(max_steps=steps)
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


def test_they_fail_as_one(folder):
    """A broken loss in one process stops both before the step, with the rows of its micro-batch."""
    for place in (0, 1):
        step, rows = json.loads((folder / f"{place}.json").read_text())["broken"]
        assert (step, rows) == (3, [22, 23])  # micro-batch 5 of process 1: step 3 has rows 16 to 23


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


@pytest.mark.parametrize(
    "environment, words",
    [
        (
            {"WORLD_SIZE": "4"},
            "WORLD_SIZE=4 is set in the environment, but not RANK, MASTER_ADDR, MASTER_PORT. .*unset",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' in the environment must be a number"),
        ({"WORLD_SIZE": "0", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=0 must be below WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='-1' in the environment"),
    ],
)
def test_an_environment_of_no_launcher_is_refused(monkeypatch, environment, words):
    """What a scheduler or an earlier job left in the environment is refused in a sentence, and nobody is waited for."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_: pytest.fail("it joins"))
    with pytest.raises(ConfigError, match=words), processes("cpu"):
        pass


def test_the_first_error_is_told_before_the_group_ends(monkeypatch, capsys):
    """An error is on stderr before the processes part, and is the one raised even if parting fails."""
    full = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in full.items():
        monkeypatch.setenv(name, value)
    said = []

    def part():
        said.append(capsys.readouterr().err)
        raise RuntimeError("no peer answers")

    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", part)
    with pytest.raises(ConfigError, match="first"), processes("cpu"):
        raise ConfigError("the first")
    with pytest.raises(ZeroDivisionError), processes("cpu"):
        1 / 0  # noqa: B018
    assert said[0] == "Process 1 of 2: the first\n" and "Traceback" in said[1] and "ZeroDivisionError" in said[1]
