"""The loop: resumes exactly, does not care how a step is cut up, and stops when the loss breaks."""

import json
import os
import signal

import pytest
import torch
from student_fakes import TEACHER, FakeSource, tiny_config

import student.files.checkpoint
from student import (
    MaskConfig,
    NonFiniteLossError,
    OptimConfig,
    PredictorConfig,
    ReconstructConfig,
    RunError,
    RunMismatchError,
    Student,
    ViTConfig,
)
from student.files.checkpoint import latest_checkpoint
from student.run.interrupts import deferred_interrupts
from student.run.trainer import Trainer
from teacher_cache.terminal.signals import Stopped, signals_raise


def make_trainer(out_dir, config=None, before=lambda step, index: None, **options) -> Trainer:
    config = config or tiny_config()
    model = Student(config, (TEACHER,))
    return Trainer(config, model, FakeSource(config, model.needs, before=before), out_dir, **options)


def metrics(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir) -> list[tuple]:
    return [(line["step"], line["loss"], line["parts"], line["lr"]) for line in metrics(out_dir)]


def assert_same_run(one: Trainer, two: Trainer):
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, two.student.state_dict()[name]), name
    assert losses(one.directory.path) == losses(two.directory.path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("runs") / "undisturbed", tiny_config(accumulate=2))
    assert trainer.fit() == 10
    return trainer


def stop_early(out_dir, config):
    assert make_trainer(out_dir, config).fit(max_steps=7) == 7


def interrupt_at(*moment):
    def before(step, index):
        if (step, index) == moment:
            raise KeyboardInterrupt

    return before


def interrupt_between_micro_batches(out_dir, config):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(out_dir, config, before=interrupt_at(7, 1)).fit()


def signal_in_the_update(out_dir, config):
    trainer = make_trainer(out_dir, config)
    update = trainer.optimizer.step

    def interrupted_update():
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        update()

    trainer.optimizer.step = interrupted_update
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 7


def signals_while_saving(out_dir, config):
    """Ctrl-C, and while its checkpoint is written SIGTERM and Ctrl-C again."""
    write = student.files.checkpoint.save_file

    def disturbed_write(tensors, path, metadata):
        if "00000007" in path.name:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        write(tensors, path, metadata)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), signals_raise():
        patch.setattr(student.files.checkpoint, "save_file", disturbed_write)
        make_trainer(out_dir, config, before=interrupt_at(7, 1)).fit()


def fail_between_micro_batches(out_dir, config):
    def before(step, index):
        if (step, index) == (7, 1):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        make_trainer(out_dir, config, before).fit()


@pytest.mark.parametrize(
    "disturb",
    [stop_early, interrupt_between_micro_batches, signal_in_the_update, signals_while_saving, fail_between_micro_batches],
)
def test_resumed_run_is_the_undisturbed_run(disturb, undisturbed, tmp_path):
    """A run that was stopped in any way and started again ends with the same weights and losses, to the bit."""
    config = tiny_config(accumulate=2)
    disturb(tmp_path / "run", config)
    resumed = make_trainer(tmp_path / "run", config)
    assert resumed.step == 7
    assert resumed.fit() == 10
    assert_same_run(resumed, undisturbed)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 11))


def test_drop_path_is_at_work(undisturbed, tmp_path):
    """The runs above do use drop path: without it the first loss is another."""
    calm = tiny_config(accumulate=2, backbone=ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2))
    trainer = make_trainer(tmp_path / "run", calm)
    trainer.fit()
    assert losses(trainer.directory.path)[0][1] != losses(undisturbed.directory.path)[0][1]


def test_finished_run_stays_as_it_is(undisturbed):
    """Starting a finished run again takes no step and writes nothing."""
    path = undisturbed.directory.path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    again = make_trainer(path, undisturbed.config)
    assert again.fit() == 10 and again.source.n_closed == 0
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_accumulation_does_not_change_the_step(tmp_path):
    """Four crops at once, twice two and four times one give the same losses and gradients, up to rounding, with drop path on."""
    trainers = [make_trainer(tmp_path / str(n), tiny_config(accumulate=n)) for n in (1, 2, 4)]
    for trainer in trainers:
        trainer.fit(max_steps=4)
    for other in trainers[1:]:
        assert [m["loss"] for m in metrics(other.directory.path)] == pytest.approx(
            [m["loss"] for m in metrics(trainers[0].directory.path)], rel=1e-5
        )
        # Adam's mean of the gradients, not the weights: the key biases have no gradient but rounding, which Adam scales
        # up to full steps.
        for one, two in zip(trainers[0].optimizer.state.values(), other.optimizer.state.values(), strict=True):
            torch.testing.assert_close(two["exp_avg"], one["exp_avg"], rtol=1e-3, atol=1e-6)


def test_loss_falls(tmp_path):
    """On four crops seen again and again the student learns."""
    config = tiny_config(
        epochs=60,
        mask=MaskConfig("random", 0.5),
        objectives=(ReconstructConfig(decoder=PredictorConfig(dim=16, depth=1, heads=2)),),
    )
    trainer = make_trainer(tmp_path / "run", config)
    endless = trainer.source.micro_batches
    first = next(endless(0, 1))
    trainer.source.micro_batches = lambda first_step, last_step: iter([first] * (last_step - first_step))
    trainer.fit()
    seen = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(seen[-10:]) / 10 < 0.8 * sum(seen[:10]) / 10


def test_log_lines(tmp_path):
    """Every step has one line with its rate, epoch, parts, speed and the share of its time spent waiting."""
    reports = []
    trainer = make_trainer(tmp_path / "run", on_step=reports.append)
    trainer.fit(max_steps=3)
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0.2), (2, 0.4), (3, 0.6)]
    peak = 0.05 * 4 / 256
    assert [line["lr"] for line in lines][:2] == pytest.approx([0, peak * 0.4])
    for line, report in zip(lines, reports, strict=True):
        assert line["loss"] == pytest.approx(0.5 * line["parts"]["mimic"] + 0.5 * line["parts"]["reconstruct"])
        assert 0 <= line["wait_share"] <= 1 and line["images_per_s"] > 0
        assert line["loss"] == report.loss


def test_non_finite_loss(tmp_path):
    """A loss that breaks stops the run with its step and rows, before it touches a weight."""
    config = tiny_config(accumulate=2)
    trainer = make_trainer(tmp_path / "run", config)
    whole = trainer.source.micro_batches

    def with_a_bad_crop(first_step, last_step):
        for batch in whole(first_step, last_step):
            if 14 in batch.rows:  # step 4, second half
                batch.images[0, 0, 0, 0] = float("inf")
            yield batch

    trainer.source.micro_batches = with_a_bad_crop
    good = make_trainer(tmp_path / "good", config)
    good.fit(max_steps=3)
    with pytest.raises(NonFiniteLossError, match=r"step 4 .*\[14, 15\]") as caught:
        trainer.fit()
    assert (caught.value.step, caught.value.rows) == (4, (14, 15))
    assert_same_run(trainer, good)
    assert trainer.source.n_closed == 1


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_non_finite_gradient(tmp_path, clip_grad):
    """A gradient that breaks under a finite loss stops the run likewise, with all rows of the step and no weight touched."""
    config = tiny_config(accumulate=2, optim=OptimConfig(base_lr=0.05, warmup_epochs=0.5, clip_grad=clip_grad))
    trainer, good = make_trainer(tmp_path / "run", config), make_trainer(tmp_path / "good", config)
    good.fit(max_steps=3)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tokens):
            return tokens.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (float("inf") if trainer.step == 3 else 1.0)

    encode = trainer.student.backbone.norm.forward
    trainer.student.backbone.norm.forward = lambda tokens: Overflow.apply(encode(tokens))
    with pytest.raises(
        NonFiniteLossError, match=r"norm of the gradient became (inf|nan), under finite losses, at step 4"
    ) as caught:
        trainer.fit()
    assert (caught.value.step, caught.value.rows) == (4, (12, 13, 14, 15))
    assert_same_run(trainer, good)


def test_run_goes_on_after_a_broken_loss(undisturbed, tmp_path):
    """A run that a broken loss has stopped is sound: with the data mended it ends as if nothing had happened."""
    trainer = make_trainer(tmp_path / "run", tiny_config(accumulate=2))
    whole = trainer.source.micro_batches

    def with_a_bad_crop(first_step, last_step):
        for batch in whole(first_step, last_step):
            if 30 in batch.rows:  # step 8, behind the checkpoint of step 5
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    trainer.source.micro_batches = with_a_bad_crop
    with pytest.raises(NonFiniteLossError, match="step 8"):
        trainer.fit()
    resumed = make_trainer(tmp_path / "run", tiny_config(accumulate=2))
    assert resumed.step == 7 and resumed.fit() == 10
    assert_same_run(resumed, undisturbed)


def test_source_that_ends_early(tmp_path):
    """A source that gives fewer batches than it promised is an error, not an early end."""
    trainer = make_trainer(tmp_path / "run")
    trainer.source.micro_batches = lambda first_step, last_step: iter([])
    with pytest.raises(RunError, match="ended at step 1 of 10"):
        trainer.fit()


def test_source_with_other_batches(tmp_path):
    """A batch of another size than the config says is refused."""
    trainer = make_trainer(tmp_path / "run")
    trainer.source.accumulate = 2
    with pytest.raises(RunError, match="batch of 2 crops at step 1.*makes 4"):
        trainer.fit()


def test_bf16_on_a_cpu(tmp_path):
    """A run that asks for bfloat16 gets it: its first loss is float32's but for rounding, and what a block gives is rounded."""
    losses = {}
    for precision in ("fp32", "auto", "bf16"):
        trainer = make_trainer(tmp_path / precision, tiny_config(precision=precision))
        trainer.on_step = lambda report, precision=precision: losses.setdefault(precision, report.loss)
        trainer.fit(max_steps=1)
    assert losses["auto"] == losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("stage", ["config.json", "checkpoint"])
def test_other_config_is_refused(tmp_path, stage):
    """A directory of a run with another config is refused naming both values, by config.json and by the checkpoint."""
    make_trainer(tmp_path / "run").fit(max_steps=1)
    other = tiny_config(seed=1)
    if stage == "checkpoint":
        description = json.loads((tmp_path / "run" / "config.json").read_text())
        description["config"] = other.to_json()
        (tmp_path / "run" / "config.json").write_text(json.dumps(description))
    with pytest.raises(RunMismatchError, match=r"another configuration:\n  seed: 0 in the run, 1 given\n"):
        make_trainer(tmp_path / "run", other)


@pytest.mark.parametrize("stage", ["config.json", "checkpoint"])
def test_other_data_is_refused(tmp_path, stage):
    """A run does not go on with the data of another cache."""
    make_trainer(tmp_path / "run").fit(max_steps=1)
    config = tiny_config()
    model = Student(config, (TEACHER,))
    source = FakeSource(config, model.needs)
    source.identity["cache"] = "other"
    if stage == "checkpoint":
        description = json.loads((tmp_path / "run" / "config.json").read_text())
        description["identity"] = source.identity
        (tmp_path / "run" / "config.json").write_text(json.dumps(description))
    with pytest.raises(RunMismatchError, match=r"other data:\n  cache: fake in the run, other given\n"):
        Trainer(config, model, source, tmp_path / "run")


def test_checkpoints_are_kept_and_removed(tmp_path):
    """There is a checkpoint at every epoch's end and every N steps; only the last K stay, and nothing half written."""
    seen = []
    trainer = make_trainer(tmp_path / "run", checkpoint_every=3, keep_checkpoints=2)
    trainer.on_step = lambda report: seen.append(latest_checkpoint(tmp_path / "run"))
    trainer.fit()
    newest = [path and int(path.stem.split("-")[1]) for path in seen]
    assert newest == [None, None, None, 3, 3, 5, 6, 6, 6, 9]  # before the checkpoint of the step itself
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoint-00000009.safetensors",
        "checkpoint-00000010.safetensors",
        "config.json",
        "metrics.jsonl",
    ]


def test_damaged_newest_checkpoint(tmp_path):
    """A run whose newest checkpoint is damaged does not start from an older one by itself: a person deletes it first."""
    make_trainer(tmp_path / "run", checkpoint_every=3).fit(max_steps=6)
    newest = latest_checkpoint(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(RunError, match="from step 5: checkpoint-00000005.safetensors is sound"):
            make_trainer(tmp_path / "run")
    newest.unlink()
    resumed = make_trainer(tmp_path / "run")
    assert resumed.step == 5 and not resumed.is_new and resumed.fit() == 10


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_deferred_signals(first, second):
    """Signals wait for the end of the block, in which none is lost; the handlers are then those from before."""
    with signals_raise():
        before = [signal.getsignal(number) for number in (first, second)]
        done = []
        with pytest.raises(KeyboardInterrupt) as caught, deferred_interrupts():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), second)
            done.append("all of it")
        assert done and [signal.getsignal(number) for number in (first, second)] == before
        assert isinstance(caught.value, Stopped) and type(caught.value.__context__) is KeyboardInterrupt
