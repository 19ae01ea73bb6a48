"""The benchmarks: each runs at its smallest size, says what it found in its last line, and compares like with like."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_layers import IMPORTS, is_in

from benchmarks import __main__ as every
from benchmarks import cpu_bf16, made_up, measure, random_rows, results, sparse, target_rivals
from teacher_cache import device
from teacher_cache.crops.beton import CropReader
from teacher_cache.errors import CacheCorruptError
from teacher_cache.inspecting.inspect import describe
from teacher_cache.store.reader import StoreReader

FEWER = {"student-step": ["--preset", "maskalign-b16"], "cached-or-live": ["--preset", "mimco-b16"],
         "step-parts": ["--preset", "maskalign-b16"], "step-parts-klt": ["--preset", "maskalign-b16"]}  # fmt: skip
"""Of the presets that a benchmark goes through, one is enough to see that it works."""
ON_A_GPU = ("student-step", "cached-or-live", "extraction-gpu", "step-parts", "step-parts-klt")
CPU = dict.fromkeys(ON_A_GPU, ["--device", "cpu"])


def last_line(module: str, arguments: list[str]) -> dict:
    """The document that a benchmark's command prints last."""
    command = importlib.import_module(f"benchmarks.{module}").main
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.large if n == "memory" else ()) for n in every.BENCHMARKS])
def test_every_benchmark_runs(name, tmp_path, monkeypatch):
    """At its smallest size each gives finite ratios with goals, hardware, versions, commit, command and figures, and leaves
    nothing behind; those for a GPU run on a CPU too, and bf16 also where it is slow."""
    for module in (device, cpu_bf16):
        monkeypatch.setattr(module, "cpu_bf16", lambda: "avx512_bf16")
    if name == "starting":
        CPU[name] = ["--against", str(checkout(tmp_path / "other")), "--cache", str(Path(__file__).parent / "golden/cache_v3")]
    module, *options = every.BENCHMARKS[name]
    arguments = [*options, *CPU.get(name, []), *FEWER.get(name, []), "--tiny", "--rounds", "1", "--scratch", str(tmp_path)]
    document = last_line(module, arguments)
    if name == "fidelity-int4" and "not_run" in document:
        pytest.skip(document["not_run"])
    assert document["name"] == {"extraction-gpu": "extraction"}.get(name, name)
    assert math.isfinite(document["ratio"]) and document["ratio"] > 0
    assert all(math.isfinite(claim["ratio"]) for claim in document["claims"])
    assert {"hardware", "versions", "commit", "command", "figures", "conditions"} <= set(document)
    assert [path.name for path in tmp_path.iterdir() if path.name != "other"] == []


def checkout(path: Path) -> Path:
    """A folder that looks like a checkout of this project with an environment of its own."""
    (path / ".venv/bin").mkdir(parents=True)
    python = path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for package in ("teacher_cache", "student", "pipelines"):
        (path / package).symlink_to(Path(__file__).parents[1] / package)
    return path


def test_without_another_checkout_it_says_so():
    """What compares two checkouts is not run with one."""
    assert "--against DIR" in last_line("starting", [])["not_run"]


@pytest.mark.parametrize("name", ON_A_GPU)
def test_without_a_gpu_it_says_so(name, monkeypatch):
    """Where there is no GPU, what needs one is not run and says so; it never runs on something else in silence."""
    monkeypatch.setattr(measure, "gpu_name", lambda: None)
    module, *options = every.BENCHMARKS[name]
    document = last_line(module, [*options, "--tiny"])
    assert document["not_run"] == "no GPU here" and document["ratio"] is None


def test_an_unknown_dtype_is_not_run():
    """Fidelity of a dtype that stores do not have is not run, and says which they have."""
    assert "float16, int8" in last_line("fidelity", ["--dtype", "int3"])["not_run"]


def test_turns():
    """Variants take turns, the first round is not counted, and ratios are taken within each round."""
    seen, rates = [], iter([9, 9, 8, 2, 6, 3, 4, 4])

    def variant(name):
        return lambda: seen.append(name) or -next(rates)

    found = measure.take_turns({"a": variant("a"), "b": variant("b")}, 3)
    assert seen == ["a", "b"] * 4
    assert found.rates == {"a": [8, 6, 4], "b": [2, 3, 4]}
    claim = measure.claim("a / b", found.over("a", "b"), 1.5)
    assert (claim.ratio, claim.lowest, claim.highest, claim.met) == (2, 1, 4, True)
    assert measure.claim("a / b", [2.0], 1.5, at_most=True).met is False
    assert measure.claim("a / b", [2.0], None).met is None


def test_the_least_margin_is_reported(capsys):
    """The document's ratio is that of the claim nearest to missing its goal, whichever way the goal points."""
    claims = [
        measure.claim("fast", [9.0], 3),
        measure.claim("small", [0.5], 0.6, at_most=True),
        measure.claim("info", [0.1], None),
    ]
    measure.report("thing", claims, {}, [], {})
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["ratio"], document["goal"], document["met"]) == (0.5, 0.6, True)


def test_rivals_that_read_other_bytes_are_refused():
    """A comparison ends with an error if one of the readers gives other bytes."""
    sound = lambda rows: {"x": rows * 2}  # noqa: E731
    rows = np.arange(4)
    random_rows.require_equal({"ours": sound, "theirs": sound}, rows)
    with pytest.raises(click.ClickException, match="theirs reads other bytes of x than ours"):
        random_rows.require_equal({"ours": sound, "theirs": lambda rows: {"x": rows * 2 + (rows == 3)}}, rows)


def test_sparse_caches(tmp_path):
    """A cache of holes is complete by its records; the rows made readable are zeros, any other is refused by its checksum."""
    cache = sparse.sparse_cache(tmp_path / "c", 40, 8)
    path = sparse.add_sparse_targets(cache.view(0), made_up.SMALL, shard_rows=16, readable=[3, 39])
    assert describe(cache)["views"][0]["stores"][0]["complete"]
    assert not CropReader(cache.view(0).path).read([0, 39]).any()
    for reader in ("mmap", "pread"):
        store = StoreReader(path, reader)
        assert all(not store.read(array, [39, 3]).any() for array in store.spec.array_names)
        with pytest.raises(CacheCorruptError, match="row 4 is damaged"):
            store.read("tokens/12", [3, 4])


def test_a_broken_benchmark_is_a_failure(tmp_path, monkeypatch):
    """`python -m benchmarks` goes on after a script that breaks, removes its old result, and ends with exit code 1."""
    monkeypatch.setattr(every, "BENCHMARKS", {"opening": ("no_such_module",), "student-step": ()})
    run = every.run
    monkeypatch.setattr(every, "run", lambda name, options: run(name, options) if name == "opening" else {"not_run": "no GPU"})
    (tmp_path / "opening.json").write_text("{}")
    result = CliRunner().invoke(every.main, ["--out", str(tmp_path)])
    assert result.exit_code == 1 and "opening: FAILED" in result.output and "student-step: not run: no GPU" in result.output
    assert not (tmp_path / "opening.json").exists() and (tmp_path / "student-step.json").exists()


def document_of(name: str, ratio: float) -> dict:
    claims = [measure.claim("ours / theirs", [ratio], 1.5).to_json()]
    figures = {f"{who}": {"unit": "rows/s", "median": rate, "lowest": rate / 2, "highest": rate * 2} for who, rate in
               (("ours", 10.0 * ratio), ("theirs", 10.0))}  # fmt: skip
    return {"name": name, "claims": claims, "figures": figures, "conditions": ["warm"], **measure.environment()}


def test_results(tmp_path):
    """Tables replace the section of the benchmarks and nothing else, with every ratio, missed or met, and what was not run;
    pictures are drawn beside."""
    out, page = tmp_path / "out", tmp_path / "docs" / "results.md"
    out.mkdir()
    page.parent.mkdir()
    (out / "random-rows.json").write_text(json.dumps(document_of("random-rows", 2.0)))
    (out / "joined-peers.json").write_text(json.dumps(document_of("joined-peers", 1.25)))
    (out / "student-step.json").write_text(json.dumps({"name": "student-step", "not_run": "no GPU here"}))
    page.write_text("# Before\n\n## Benchmarks\n\nold\n\n### older\n\n## After\n\nkept\n")
    for _ in range(2):  # again over its own output
        result = CliRunner().invoke(results.main, [str(out), "--page", str(page)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert text.startswith("# Before\n\n## Benchmarks\n\n") and text.endswith("\n\n## After\n\nkept\n") and "old" not in text
        assert "| random-rows: ours / theirs | 2 | 2 .. 2 | at least 1.5 | met |" in text
        assert "| joined-peers: ours / theirs | 1.25 | 1.25 .. 1.25 | at least 1.5 | **missed** |" in text
        assert "Not run: no GPU here." in text
    pictures = sorted(path.name for path in (page.parent / "img").iterdir())
    assert pictures == ["claims.png", "joined-peers.png", "random-rows.png"]
    page.write_text("no section")
    result = CliRunner().invoke(results.main, [str(out), "--page", str(page)])
    assert result.exit_code == 1 and "no section '## Benchmarks'" in result.output


def test_nothing_imports_the_benchmarks():
    """The project does not know its benchmarks."""
    assert [module for module, imported in IMPORTS.items() if any(is_in(name, "benchmarks") for name in imported)] == []


def test_every_script_is_run():
    """Each module of the folder that has a command is one that `python -m benchmarks` runs, or said to be run alone."""
    scripts = {path.stem for path in Path(every.__file__).parent.glob("*.py") if "@measure.options" in path.read_text()}
    assert scripts == {module for module, *_ in every.BENCHMARKS.values()} | set(every.BY_HAND)


def test_rivals_lose_what_theory_says():
    """On normal tokens of variance 1 a rotation with Lloyd-Max levels, and a transform, lose what such levels lose; a product
    quantiser of two channels less than one of single levels, and uniform levels more."""
    tokens = torch.randn((2, 4096, 32), generator=torch.Generator().manual_seed(0))

    def lost(rival) -> float:
        return ((rival.read_back(tokens) - tokens).square().mean() / tokens.square().mean()).item()

    for kind in ("random", "Hadamard"):
        assert lost(target_rivals.rotated(tokens, 4, kind)) == pytest.approx(0.0095, rel=0.1)
    for together in (True, False):
        assert lost(target_rivals.Spectrum(tokens, together).code(3.0, False)) == pytest.approx(0.0345, rel=0.1)
    assert 0.0625 < lost(target_rivals.product(tokens, 2, 4)) < 0.1175 < lost(target_rivals.uniform(2, 32))
    assert target_rivals.uniform(5, 16).bits == 6.0
