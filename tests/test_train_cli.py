"""student-train and student-eval from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from student.cli import evaluate, train

FIT = ["--set", "backbone.image_size=32", "--set", "backbone.patch_size=8", "--set", "batch_size=8"]


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
    assert json.loads(result.output)["accuracy"]["knn/mean/10"] > 1 / 3


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
        "import sys; from student.cli import train; train(sys.argv[1:], standalone_mode=False);"
        "print([m for m in sys.modules if m.startswith(('teacher_cache.teachers', 'open_clip', 'teacher_cache.extract'))])"
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
        (["--preset", "mae-b16", "--cache", "nowhere", "--out", "x"], 1, "nowhere is no cache"),
        (["--preset", "mae-b16", "--set", "batch"], 2, "--set batch: give key=value"),
        (["--preset", "mae-b16", "--set", "batch=3"], 2, "no field 'batch'.*batch_size"),
        (["--preset", "mae-b16", "--cache", "CACHE", "--out", "x"], 2, "are 32 px, mae-b16 takes 224 px"),
        (
            ["--preset", "mae-b16", *FIT, "--set", "batch_size=4096", "--cache", "CACHE", "--out", "x"],
            1,
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


def test_another_configuration_is_refused(shared_cache, tmp_path):
    """--out that holds another run is refused, naming what differs; the run there stays as it is."""
    assert maskalign(shared_cache, tmp_path / "run", "--max-steps", "1").exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    result = maskalign(shared_cache, tmp_path / "run", "--set", "optim.weight_decay=0.1")
    assert result.exit_code == 1 and "optim.weight_decay was 0.05, is now 0.1" in result.output
    result = maskalign(shared_cache, tmp_path / "run", "--views", "1")
    assert result.exit_code == 1 and "views" in result.output
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}


def test_list_and_show():
    """--list names every preset; --show prints paper, deviations and every setting with its value."""
    listed = run(train, "--list").output
    shown = run(train, "--preset", "mr-mae-b16", "--show").output
    assert "maskalign-b16" in listed and "Deviations:" in shown
    assert "objectives.0.weight=0.5\n" in shown and "backbone.fuse_blocks=3,6,9,12\n" in shown
    settings = [line.strip() for line in shown.split("Settings")[1].splitlines()[1:] if line.strip()]
    again = run(train, "--preset", "mr-mae-b16", "--show", *[word for setting in settings for word in ("--set", setting)])
    assert again.output == shown  # every line can be handed back to --set


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_cleanly(shared_cache, tmp_path, number):
    """Ctrl-C and pre-emption end a run with one clean line and its last step saved; the same command finishes it."""
    arguments = ["--cache", str(shared_cache.path), "--preset", "mae-b16", "--tiny", *FIT, "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "student.cli", *arguments, "--set", "epochs=2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert re.search(r"^Interrupted\. Step [\d,]+ is saved; the same command goes on", output, re.MULTILINE), output
    n_steps = len(metrics(tmp_path / "run"))
    assert n_steps > 5
    result = run(train, *arguments, "--set", "epochs=2000", "--max-steps", str(n_steps + 3))
    assert result.exit_code == 0 and f"resumed  at step {n_steps:,}" in result.output
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, n_steps + 4))
