"""student-train and student-eval from the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes import FakeTeacher
from safetensors import safe_open
from safetensors.torch import save_file

from pipelines.feed.loader import JoinedLoader
from student.batch import Needs
from student.cli.evaluate import evaluate
from student.cli.train import train
from student.modules.model import Student
from teacher_cache.extraction.extract import ExtractPlan, extract_view

FIT = ["--set", "backbone.image_size=32", "--set", "backbone.patch_size=8", "--set", "batch_size=8"]
CHECKPOINT = "checkpoint-00000001.safetensors"


def run(command, *arguments) -> object:
    """The result of a command; a traceback is a failed test."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def maskalign(cache, out, *more):
    return run(
        train, "--cache", cache.path, "--preset", "maskalign-b16", "--tiny", *FIT, "--teacher", "fake", "--out", out, *more
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(out: Path) -> dict:
    (path,) = sorted(out.glob("checkpoint-*.safetensors"))[-1:]
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_train_and_evaluate(shared_cache, tmp_path):
    """A run says how often each crop is seen, logs every step, and its student can be evaluated on the cache."""
    result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "2 views: each crop will be seen 1 times in 2 epochs" in result.output
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(0 <= line["wait_share"] <= 1 and line["images_per_s"] > 0 for line in lines)
    result = run(evaluate, "knn", tmp_path / "run", "--train", shared_cache.path, "--val", shared_cache.path, "--json")
    assert result.exit_code == 0, result.output
    # every image has itself among its neighbours; with all 24 of them voting, accuracy is still better than chance
    assert json.loads(result.stdout)["accuracy"]["knn/mean/10"] > 1 / 3


def test_resumed_equals_undisturbed(shared_cache, tmp_path):
    """Two interruptions change neither a loss nor a weight, to the bit."""
    assert maskalign(shared_cache, tmp_path / "whole").exit_code == 0
    for steps in ("2", "5", "6"):
        assert maskalign(shared_cache, tmp_path / "parts", "--max-steps", steps).exit_code == 0
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts]
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert expected.keys() == found.keys() and all((expected[name] == found[name]).all() for name in expected)


def test_the_teacher_is_absent(shared_cache, tmp_path):
    """Training from a cache imports no teacher and saves none of its parameters."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "mr-mae-b16", "--tiny", *FIT, "--teacher", "fake",
                 "--out", str(tmp_path / "run"), "--max-steps", "2"]  # fmt: skip
    code = (
        "import sys; from student.cli.train import train; train(sys.argv[1:], standalone_mode=False);"
        "print([m for m in sys.modules if m.startswith(('teacher_cache.teachers', 'open_clip',"
        "'teacher_cache.extraction'))])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    names = {name.split(".")[1] for name in tensors(tmp_path / "run")}
    assert names == {"backbone", "objectives"}


def test_live_trains_too(shared_cache, teacher, tmp_path, monkeypatch):
    """--live runs the teacher on the same crops, and its first loss is the cached run's to int8's error."""
    import teacher_cache.teachers

    monkeypatch.setattr(teacher_cache.teachers, "load_teacher", lambda *_: teacher)
    assert maskalign(shared_cache, tmp_path / "live", "--live", "--max-steps", "1").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "cached", "--max-steps", "1").exit_code == 0
    (live,), (cached,) = metrics(tmp_path / "live"), metrics(tmp_path / "cached")
    assert live["loss"] == pytest.approx(cached["loss"], rel=1e-2) and live["loss"] != cached["loss"]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "--preset is missing; student-train --list"),
        (["--preset", "maskaling-b16"], 2, "no preset 'maskaling-b16'. Did you mean maskalign-b16?"),
        (["--preset", "mae-b16"], 2, "--cache is missing"),
        (["--preset", "mae-b16", "--cache", "nowhere", "--out", "x"], 2, "nowhere is no cache"),
        (["--preset", "mae-b16", "--cache", "CACHE", "--out", "x", "--reader", "pread"], 2, "--reader is about stored targets"),
        (["--preset", "mae-b16", "--cache", "CACHE", "--out", "x", "--check", "never"], 2, "--check is about stored targets"),
        (["--preset", "maskalign-b16", "--live", "--reader", "mmap", "--cache", "CACHE", "--out", "x"], 2, "this run reads none"),
        (["--preset", "mae-b16", "--set", "backbone.depth=1000000000"], 2, "depth must be at most 512"),
        (["--preset", "mae-b16", "--set", "objectives.0.weight=nan"], 2, "weight must be a finite number, not nan"),
        (["--preset", "mae-b16", "--set", "preset=\x1b[2J", "--show"], 2, "preset must be printable"),
        (["--preset", "mae-b16", "--keep-checkpoints", "0"], 2, "0 is not in the range"),
        (["--preset", "mae-b16", "--set", "batch"], 2, "--set batch: give key=value"),
        (["--preset", "mae-b16", "--set", "batch=3"], 2, "no field 'batch'.*batch_size"),
        (["--preset", "mae-b16", "--cache", "CACHE", "--out", "x"], 2, "crop plan size: 32 in the cache, 224 in the preset"),
        (
            ["--preset", "mae-b16", "--tiny", "--set", "batch_size=4096", "--cache", "CACHE", "--out", "x"],
            2,
            "24 rows, one step takes 4,096",
        ),
        (
            ["--preset", "maskalign-b16", "--tiny", *FIT, "--cache", "CACHE", "--out", "x"],
            2,
            "no targets of clip-b16; it has fake, .*extract",
        ),
        (["--preset", "mae-b16", "--cache", "CACHE", "--out", "x", "--device", "tpu"], 2, "--device tpu: give auto, cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_requests(shared_cache, tmp_path, monkeypatch, arguments, code, message):
    """A wrong request ends with one sentence that says what was given, what is right and what to do, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    result = run(train, *[shared_cache.path if argument == "CACHE" else argument for argument in arguments])
    assert result.exit_code == code and re.search(message, result.output, re.DOTALL), result.output
    assert not list(tmp_path.iterdir())


def test_another_run_is_refused(shared_cache, tmp_path):
    """--out that holds another run is refused, naming both sides of what differs; the run there stays as it is."""
    assert maskalign(shared_cache, tmp_path / "run", "--max-steps", "1").exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    result = maskalign(shared_cache, tmp_path / "run", "--set", "optim.weight_decay=0.1")
    assert result.exit_code == 2 and "\n  optim.weight_decay: 0.05 in the run, 0.1 given\n" in result.output
    assert "--change KEY=VALUE" in result.output
    result = run(
        train,
        "--cache",
        shared_cache.path,
        "--preset",
        "maskalign-b16",
        "--tiny",
        *FIT,
        "--teacher",
        "fake16",
        "--out",
        tmp_path / "run",
    )
    assert result.exit_code == 2 and "teachers: fake in the run, fake16 given" in result.output
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}


def test_other_targets_under_the_same_name(cache, teacher, tmp_path):
    """A run does not go on with targets of another teacher that took the place of its own: both weights are named."""
    assert maskalign(cache, tmp_path / "run", "--max-steps", "1").exit_code == 0
    other = FakeTeacher(seed=1)
    for view in cache.views():
        shutil.rmtree(view.store_path("fake"))
    for view in cache.views():
        extract_view(view, "fake", other, ExtractPlan(shard_rows=8, batch_size=5))
    result = maskalign(cache, tmp_path / "run")
    weights = [spec.weights_sha256[:12] for spec in (teacher.spec, other.spec)]
    expected = f"weights of the teacher: sha256 {weights[0]} in the run, sha256 {weights[1]} given"
    assert result.exit_code == 2 and expected in result.output and "output of the teacher on the probe image" in result.output


def test_accepted_mismatch(shared_cache, tmp_path):
    """A preset refuses crops that it was not made for, with the command that makes the right ones; accepted, it is on record."""
    arguments = ["--cache", shared_cache.path, "--preset", "mae-demo", "--set", "batch_size=8", "--max-steps", "1", "--out"]
    refused = run(train, *arguments, tmp_path / "refused")
    assert refused.exit_code == 2 and "crop plan scale: [0.3, 1.0] in the cache, [0.5, 1.0] in the preset" in refused.output
    assert "teacher-cache crop --preset mae-demo --images DIR NEW" in refused.output and not (tmp_path / "refused").exists()
    accepted = run(train, *arguments, tmp_path / "run", "--accept-mismatch")
    assert accepted.exit_code == 0 and "(accepted)" in accepted.output
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["identity"]
    assert [line.split(":")[0] for line in identity["accepted_mismatch"]] == ["crop plan scale", "crop plan flip_p"]


def test_live_takes_the_teacher_that_is_named(shared_cache, tmp_path):
    """--live runs the teacher of --teacher, not the preset's, and refuses one that does not exist."""
    arguments = ["--cache", shared_cache.path, "--preset", "maskalign-demo", "--tiny", "--live", "--max-steps", "1"]
    result = run(train, *arguments, "--teacher", "nonsense", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "no teacher named 'nonsense'" in result.output
    assert run(train, *arguments, "--teacher", "demo", "--out", tmp_path / "run").exit_code == 0
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["identity"]
    assert [teacher["live"] for teacher in identity["teachers"]] == ["demo"]


def test_raw_targets_need_a_teacher_on_the_spot(shared_cache, tmp_path):
    """Blocks without whitening come from --live alone, for losses on blocks alone, and make another run than whitened ones."""
    given = ["--cache", shared_cache.path, "--tiny", "--raw-targets", "--max-steps", "1", "--out", tmp_path / "run"]
    stored = run(train, "--preset", "maskalign-demo", *given)
    assert stored.exit_code == 2 and "--raw-targets goes with --live" in stored.output
    norm = run(train, "--preset", "milan-demo", "--live", *given)
    assert norm.exit_code == 2 and "milan-demo learns from the teacher's final norm (cosine)" in norm.output
    assert not (tmp_path / "run").exists()
    assert run(train, "--preset", "maskalign-demo", "--live", *given).exit_code == 0
    given.remove("--raw-targets")
    other = run(train, "--preset", "maskalign-demo", "--live", *given)
    assert other.exit_code == 2 and "teachers.0.raw: True in the run, none given" in other.output


def test_two_teachers(shared_cache, tmp_path):
    """Joint training reads two stores of one cache, and says so in the run's identity."""
    arguments = [
        "--cache",
        shared_cache.path,
        "--preset",
        "mr-mae-b16-clip-dino",
        "--tiny",
        "--max-steps",
        "1",
        "--out",
        tmp_path / "run",
    ]
    result = run(train, *arguments, "--teacher", "fake")
    assert result.exit_code == 2 and "has 2 teachers (clip-b16, dino-b16): give --teacher" in result.output
    assert run(train, *arguments, "--teacher", "fake", "--teacher", "fake16").exit_code == 0
    (line,) = metrics(tmp_path / "run")
    assert {"mimic", "mimic-2", "reconstruct"} <= set(line["parts"])
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["identity"]
    assert [teacher["store"] for teacher in identity["teachers"]] == ["fake", "fake16"]


def test_masks_are_drawn_ahead(shared_cache, tmp_path, monkeypatch):
    """MaskAlign looks at no hidden patch, so of 16 patches a run reads the tokens of 4; it is that of whole rows to the bit."""
    kept = []

    class Noted(JoinedLoader):
        def __init__(self, *arguments, **options):
            kept.append(options["kept"])
            super().__init__(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.feed.crop_source.JoinedLoader", Noted)
        assert maskalign(shared_cache, tmp_path / "ahead").exit_code == 0
        patch.setattr(Student, "masks_ahead", lambda student, config: None)
        assert maskalign(shared_cache, tmp_path / "whole").exit_code == 0
    assert kept == [[4], [0]]
    first, second = tensors(tmp_path / "ahead"), tensors(tmp_path / "whole")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_targets_that_are_not_finite(shared_cache, tmp_path, monkeypatch):
    """A store whose targets are infinite stops the run at its step with the rows; the run folder goes on once they are mended."""
    from pipelines.feed.cached_source import CachedSource

    sound = CachedSource._targets

    def with_infinity(source, raw):
        targets = sound(source, raw)
        if 7 in raw.rows:
            targets[0].tokens[list(raw.rows).index(7)] = float("inf")
        return targets

    with monkeypatch.context() as patch:
        patch.setattr(CachedSource, "_targets", with_infinity)
        result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == 1 and "Traceback" not in result.output
    step, rows = re.search(r"loss became (?:nan|inf) at step (\d) .* Rows of that batch: \[([\d, ]+)\]", result.output).groups()
    assert "7" in rows.split(", ") and len(metrics(tmp_path / "run")) == int(step) - 1
    assert maskalign(shared_cache, tmp_path / "run").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "whole").exit_code == 0
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_damaged_row_loses_no_step(shared_cache, tmp_path, monkeypatch):
    """A row that cannot be read ends the run with its own message and code, behind a sentence that says which step is saved."""
    from pipelines.feed.cached_source import CachedSource
    from teacher_cache.errors import CacheCorruptError

    sound, calls = CachedSource._targets, []

    def damaged(source, raw):
        calls.append(raw)
        if len(calls) == 5:
            raise CacheCorruptError("Shard 1 is damaged.")
        return sound(source, raw)

    with monkeypatch.context() as patch:
        patch.setattr(CachedSource, "_targets", damaged)
        result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == 1 and result.output.endswith("\nError: Shard 1 is damaged.\n"), result.output
    assert "Step 4 is saved; the same command goes on from there." in result.output
    record = json.loads((tmp_path / "run" / "failed-00000005.json").read_text())
    source = CachedSource(shared_cache, ["fake"], [Needs((-1,))], batch_size=8)
    assert record["view"] == 1 and record["rows"] == next(iter(source.micro_batches(4, 5))).rows.tolist()
    result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == 0 and "resumed  at step 4" in result.output
    assert maskalign(shared_cache, tmp_path / "whole").exit_code == 0
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_changes_under_way(shared_cache, tmp_path):
    """--change holds from the next step on and is told; without it the run goes on so; what cannot be changed is refused."""
    assert maskalign(shared_cache, tmp_path / "run", "--max-steps", "2").exit_code == 0
    result = maskalign(shared_cache, tmp_path / "run", "--change", "optim.base_lr=1e-5", "--max-steps", "4")
    assert result.exit_code == 0 and "changed  optim.base_lr 0.001 -> 1e-05 from step 3 on" in result.output, result.output
    result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == 0 and "changed  optim.base_lr 0.001 -> 1e-05 from step 3 on" in result.output
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["changes"]) == 1
    for key, reason in (("epochs=3", "epochs cannot be changed"), ("views=1", "give --views N"), ("x", "--change x: give key=")):
        result = maskalign(shared_cache, tmp_path / "run", "--change", key)
        assert result.exit_code == 2 and reason in result.output, result.output


def test_a_view_that_came_later(cache, teacher, tmp_path):
    """A run keeps the views it was begun with when the cache gets more; --views takes them from the next step on, and a run that
    goes back to an older checkpoint takes every step from the view it had."""
    shutil.move(cache.view(1).path, tmp_path / "kept")
    long = ["--set", "epochs=4", "--keep-checkpoints", "9"]
    assert maskalign(cache, tmp_path / "run", *long, "--max-steps", "4").exit_code == 0
    assert maskalign(cache, tmp_path / "one view", *long).exit_code == 0
    shutil.move(tmp_path / "kept", cache.view(1).path)
    result = maskalign(cache, tmp_path / "run", *long, "--max-steps", "7")
    assert result.exit_code == 0 and "1 view:" in result.output, result.output
    losses = [line["loss"] for line in metrics(tmp_path / "one view")]
    assert [line["loss"] for line in metrics(tmp_path / "run")] == losses[:7]

    result = maskalign(cache, tmp_path / "run", *long, "--views", "2")  # epoch 2 goes on with view 0, epoch 3 takes view 1
    assert result.exit_code == 0 and "changed  views 1 -> 2 from step 8 on" in result.output, result.output
    taken = [line["loss"] for line in metrics(tmp_path / "run")]
    assert taken[:9] == losses[:9] and taken[9] != losses[9]
    for path in sorted((tmp_path / "run").glob("checkpoint-*"))[1:]:
        path.unlink()
    result = maskalign(cache, tmp_path / "run", *long)
    assert result.exit_code == 0 and "changed  views 1 -> 2 from step 8 on" in result.output
    assert [line["loss"] for line in metrics(tmp_path / "run")] == taken
    result = maskalign(cache, tmp_path / "run", *long, "--views", "3")
    assert result.exit_code in (1, 2) and "has 2 finished views, 3 are asked for" in result.output


def test_micro_batches_are_no_part_of_a_run(shared_cache, tmp_path):
    """A run may go on with another --micro-batch or accumulate; one that does not divide the batch is refused."""
    assert maskalign(shared_cache, tmp_path / "run", "--max-steps", "2").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "run", "--max-steps", "4", "--micro-batch", "2").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "run", "--set", "accumulate=2").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "whole").exit_code == 0
    whole, cut = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert [line["loss"] for line in cut] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    result = maskalign(shared_cache, tmp_path / "run", "--micro-batch", "3")
    assert result.exit_code == 2 and "Give one of 8, 4, 2, 1." in result.output


def test_readers_give_the_same_run(shared_cache, tmp_path):
    """Whichever way targets are read, the losses are the same, and a run may be resumed with another reader."""
    assert maskalign(shared_cache, tmp_path / "run", "--reader", "mmap", "--max-steps", "1").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "run", "--reader", "pread", "--check", "always", "--max-steps", "3").exit_code == 0
    assert maskalign(shared_cache, tmp_path / "whole", "--max-steps", "3").exit_code == 0
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(tmp_path / "whole")]


def test_keep_checkpoints(shared_cache, tmp_path):
    """--keep-checkpoints says how many stay; where there is none yet, the run says that it starts again."""
    arguments = ["--checkpoint-every", "1", "--keep-checkpoints", "3"]
    assert maskalign(shared_cache, tmp_path / "run", *arguments).exit_code == 0
    names = [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))]
    assert names == [f"checkpoint-0000000{step}.safetensors" for step in (4, 5, 6)]
    for name in names:
        (tmp_path / "run" / name).unlink()
    result = maskalign(shared_cache, tmp_path / "run", "--max-steps", "1")
    assert result.exit_code == 0 and "resumed  at step 0: no checkpoint is there" in result.output


@pytest.mark.parametrize(
    "make, code, message",
    [
        (lambda run: None, 2, "holds no checkpoint. Give the --out folder"),
        (lambda run: run.write_text("mine"), 1, "cannot be read as weights"),
        (lambda run: (run / CHECKPOINT).parent.mkdir(), 2, "holds no checkpoint"),
        (lambda run: [run.mkdir(), (run / CHECKPOINT).write_bytes(b"x" * 99)], 1, "is damaged .* Restore it"),
        (lambda run: [run.mkdir(), (run / CHECKPOINT).mkdir()], 1, "cannot be read"),
        (
            lambda run: [run.mkdir(), (run / CHECKPOINT).symlink_to("/etc/passwd")],
            1,
            "is a link to /etc/passwd, outside the folder",
        ),
        (
            lambda run: [run.mkdir(), save_file({"a": torch.zeros(1)}, run / CHECKPOINT)],
            1,
            "no readable description of a student",
        ),
    ],
    ids=["nothing", "file", "empty", "garbage", "folder", "link", "foreign"],
)
def test_evaluating_what_is_no_run(shared_cache, tmp_path, make, code, message):
    """student-eval on a folder that holds no sound run ends with one sentence."""
    make(tmp_path / "run")
    result = run(evaluate, "knn", tmp_path / "run", "--train", shared_cache.path, "--val", shared_cache.path)
    assert result.exit_code == code and re.search(message, result.output) and result.output.count("\n") == 1, result.output


def test_list_and_show():
    """--list names every preset; --show prints paper, deviations and every setting with its value."""
    listed = run(train, "--list").output
    shown = run(train, "--preset", "mr-mae-b16", "--show").output
    assert "maskalign-b16" in listed and "Deviations:" in shown
    assert "objectives.0.weight=0.5\n" in shown and "backbone.fuse_blocks=3,6,9,12\n" in shown
    settings = [line.strip() for line in shown.split("Settings")[1].splitlines()[1:] if line.strip()]
    again = run(train, "--preset", "mr-mae-b16", "--show", *[word for setting in settings for word in ("--set", setting)])
    assert again.output == shown  # every line can be handed back to --set


@pytest.mark.parametrize("number, code, how", [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 75, "Stopped by SIGTERM")])
@pytest.mark.parametrize(
    "step, said", [(0, "No step is saved yet; the same command starts again."), (4, "Step 4 is saved; the same")]
)
def test_signals_save_the_last_step(shared_cache, tmp_path, monkeypatch, number, code, how, step, said):
    """Ctrl-C and SIGTERM in the middle of a step save the one before it, say so, and have exit codes of their own."""
    draw_drops = Student.draw_drops

    def disturbed(self, seed, step_now, *options):
        if step_now == step:
            os.kill(os.getpid(), number)
        return draw_drops(self, seed, step_now, *options)

    monkeypatch.setattr(Student, "draw_drops", disturbed)
    result = maskalign(shared_cache, tmp_path / "run")
    assert result.exit_code == code and f"\n{how}. {said}" in result.output
    monkeypatch.undo()
    result = maskalign(shared_cache, tmp_path / "run", "--max-steps", step + 1)
    assert result.exit_code == 0 and f"resumed  at step {step}" in result.output


@pytest.mark.slow
def test_preemption(shared_cache, tmp_path):
    """While one process trains its folder is refused to another; SIGTERM ends it with code 75 and one clean line; then the same
    command goes on."""
    arguments = [
        "--cache",
        shared_cache.path,
        "--preset",
        "mae-b16",
        "--tiny",
        *FIT,
        "--out",
        tmp_path / "run",
        "--set",
        "epochs=2000",
    ]
    command = [sys.executable, "-m", "student", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 5) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    second = run(train, *arguments)
    assert second.exit_code == 2 and f"process {process.pid} on host {socket.gethostname()} is training there" in second.output
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output, output
    saved = re.search(
        r"^Stopped by SIGTERM\. Step ([\d,]+) is saved; the same command goes on from there\.$", output, re.MULTILINE
    )
    n_steps = len(metrics(tmp_path / "run"))
    assert n_steps > 5 and int(saved[1].replace(",", "")) == n_steps
    result = run(train, *arguments, "--max-steps", n_steps + 3)
    assert result.exit_code == 0 and f"resumed  at step {n_steps:,}" in result.output
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, n_steps + 4))


def test_a_miniature_takes_the_only_store(cache, tmp_path):
    """--tiny trains from the one store that a cache has, and says that it is not the preset's; of several it chooses none."""
    for view in cache.views():
        for name in ("fake16", "fake-zstd"):
            shutil.rmtree(view.store_path(name))
    tiny = ["--cache", str(cache.path), "--preset", "maskalign-b16", "--tiny", *FIT, "--max-steps", "1"]
    result = CliRunner().invoke(train, [*tiny, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert f"teacher  fake, the only one in {cache.path}; the preset's is clip-b16" in result.stderr


@pytest.mark.parametrize(
    ("name", "command"),
    [("nope", None), ("clip-b16", "--teacher clip-b16 --weights PATH --image-size 128 "), ("demo", "--teacher demo "),
     ("moby-swin-t", "--teacher moby-swin-t --weights PATH "), ("timm:any", "--teacher timm:any ")],
)  # fmt: skip
def test_only_teachers_that_exist_are_advised(shared_cache, tmp_path, name, command):
    """A missing store is answered with the command that makes it, whole, on the student's grid, if there is such a teacher."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "maskalign-demo", "--teacher", name, "--out", str(tmp_path / "r")]
    said = CliRunner().invoke(train, arguments).stderr
    assert f"has no targets of {name}; it has" in said and (" Make them: " in said) == (command is not None)
    assert command is None or f"teacher-cache extract {command}{shared_cache.path}" in said


def test_a_preset_names_the_size_of_its_teacher(shared_cache, tmp_path):
    """A teacher of another native grid is advised at the size that gives it the student's."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "maskalign-b16-dinov3", "--out", str(tmp_path / "r")]
    said = CliRunner().invoke(train, arguments).stderr
    assert f"extract --teacher timm:vit_base_patch16_dinov3.lvd1689m --image-size 224 {shared_cache.path}" in said
    said = CliRunner().invoke(train, [*arguments, "--teacher", "fake"]).stderr
    assert (
        "--preset maskalign-b16-dinov3 --teacher timm:vit_base_patch16_dinov3.lvd1689m --image-size 224 --images DIR NEW" in said
    )


def test_an_out_that_cannot_be_made(shared_cache):
    """A folder that cannot be made for the run is one sentence with what to do."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "mae-b16", "--tiny", "--out", "/proc/run"]
    result = CliRunner().invoke(train, arguments)
    assert (
        result.exit_code == 1 and "/proc/run: cannot be made" in result.stderr and "Choose an --out that can be" in result.stderr
    )
