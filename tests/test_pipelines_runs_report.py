"""student-report: evaluations and probes beside curves, and several runs on one page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_pipelines_run_report import N_STEPS, make_run, opened, run

from pipelines.pages.of_run.comparison import LOOKS, differing, names_of
from pipelines.pages.of_run.curves import STYLES
from pipelines.pages.of_run.evaluations import Evaluations
from pipelines.pages.of_run.run_facts import read_run
from student.cli.evaluating.subjects import Resolver
from student.cli.report import MOST_RUNS
from student.evals.records import FORMAT

CHECKPOINT = f"checkpoint-{N_STEPS:08d}.safetensors"


def probe_line(step: int, value: float, images: str = "a") -> str:
    sides = {side: {"fingerprint": images + side, "images": 30} for side in ("train", "val")}
    probe = {
        "name": "knn",
        "protocol": "knn (DINO)",
        "main": "cls/20",
        "values": {"cls/20": value, "mean/20": value / 2},
        **sides,
    }
    return json.dumps({"step": step, "epoch": step / 3, "probe": probe}) + "\n"


def record(what: str, value: float, evaluator: str = "knn", data: str = "v", checkpoint: str = "", weights: str = "") -> dict:
    return {
        "format": FORMAT, "evaluator": evaluator, "protocol": f"{evaluator} by the book", "what": what, "about": "",
        "checkpoint": checkpoint, "weights": weights or what, "readout": "cls", "layer": "last", "share": 1.0, "seeds": [0],
        "data": {"val": {"fingerprint": data, "images": 9, "name": f"images-{data}"}}, "main": "20",
        "results": {"20": {"mean": value, "deviation": None, "values": [value]}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shared_cache):
    """Three runs: MR-MAE, the same with another seed behind an equal name, and MILAN; the first two have probes. Read only."""
    root = tmp_path_factory.mktemp("several")
    first = make_run(root / "mr-mae", shared_cache, "mr-mae-b16")
    second = shutil.copytree(first, root / "again" / "mr-mae")
    third = make_run(root / "milan", shared_cache, "milan-b16")
    description = json.loads((second / "config.json").read_text())
    description["config"]["seed"] = 7
    (second / "config.json").write_text(json.dumps(description))
    for folder, value in ((first, 0.5), (second, 0.75)):
        with open(folder / "metrics.jsonl", "a") as file:
            file.writelines([probe_line(6, value), probe_line(12, value + 0.125)])
    return [first, second, third]


@pytest.fixture(scope="module")
def records(runs, tmp_path_factory):
    """Two protocols on two sets of images: of two runs, of the teacher, and of a run that is not asked for."""
    first, _, third = runs
    lines = [
        record("a", 0.5, checkpoint=str(first / CHECKPOINT)), record("b", 0.75, checkpoint=str(third / CHECKPOINT)),
        record("teacher", 0.9), record("a", 0.25, "linear", checkpoint=str(first / CHECKPOINT)),
        record("a", 0.99, data="w", checkpoint=str(first / CHECKPOINT)), record("stranger", 0.1, data="x"),
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("records") / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def page(runs, records):
    path = runs[0].parent / "several.html"
    run(*runs, "--evaluations", records, "-o", path)
    return path


def tables(html: str) -> dict[str, list[list[str]]]:
    """Caption -> rows of cells, of every table of a page."""
    found = {}
    for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
        cells = [
            [re.sub("<.*?>", "", cell).strip() for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
        ]
        found[re.search("<caption>(.*?)</caption>", table)[1]] = cells
    return found


def test_what_can_be_compared_stands_together(page):
    """A table for each protocol and set of images, the best first, with the runs by name and step; what no run here is part of is
    left out."""
    found = {caption: rows for caption, rows in tables(page.read_text()).items() if "by the book" in caption}
    assert found == {
        "knn by the book; val images-v (9)": [
            ["teacher", "cls", "90.0%"], ["milan, step 12", "cls", "75.0%"], ["several0/mr-mae, step 12", "cls", "50.0%"],
        ],
        "linear by the book; val images-v (9)": [["several0/mr-mae, step 12", "cls", "25.0%"]],
        "knn by the book; val images-w (9)": [["several0/mr-mae, step 12", "cls", "99.0%"]],
    }  # fmt: skip


def test_what_differs(runs, page):
    """Only what is not the same in all runs is in the table, of settings and of data; equal names are told apart."""
    facts = [read_run(folder) for folder in runs]
    assert names_of(facts) == ["several0/mr-mae", "again/mr-mae", "milan"]
    assert differing(facts[:2]) == [["seed", "0", "7"]] and differing([facts[0], facts[0]]) == []
    rows = {row[0]: row[1:] for row in tables(page.read_text())["Settings and data that are not the same in all runs"]}
    assert rows["preset"] == ["mr-mae-b16", "mr-mae-b16", "milan-b16"] and rows["seed"] == ["0", "7", "0"]
    assert "batch_size" not in rows and "crops" not in rows


@pytest.mark.parametrize(
    "fields, name, told",
    [
        ({"dtype": "int4"}, "targets", ["fake, weights {}, int8", "fake, weights {}, int4"]),
        ({"shared_sha256": "ab" * 32}, "quantiser, head and probe of the targets", ["", "abababababab"]),
        ({"live": "fake", "raw": True}, "targets", ["fake, weights {}, int8", "fake, weights {}, run live, not whitened"]),
    ],
)
def test_targets_that_differ(runs, fields, name, told):
    """Runs that learned from other targets of the same teacher, of other bits, another quantiser or not whitened, differ."""
    facts = read_run(runs[0])
    identity = facts.description["identity"]
    (teacher,) = identity["teachers"]
    other = {**identity, "teachers": [{**teacher, **fields}]}
    pair = [facts, replace(facts, description={**facts.description, "identity": other})]
    assert differing(pair) == [[name, *(words.format(teacher["weights_sha256"][:12]) for words in told)]]


def test_curves_lie_on_each_other(page):
    """Each run has a line in the charts of what it has, named in words; different losses are not to be compared."""
    labels = re.findall(r'aria-label="([^"]+) by epoch: ([^"]+)"', page.read_text())
    told = {caption: lines for caption, lines in labels}
    assert [told["The loss that each run minimises"].count(name) for name in ("several0/mr-mae", "again/mr-mae", "milan")] == [
        1,
        1,
        1,
    ]
    probe = told["Probe: knn with 20 neighbours, % of 30 images right by the votes of 30 (cls)"]
    assert probe == "several0/mr-mae from 50 to 62.5; again/mr-mae from 75 to 87.5"
    assert "These runs minimise different losses" in page.read_text()
    rows = tables(page.read_text())["Each run, with the line by which it is drawn below"]
    assert [row[1:3] for row in rows] == [
        ["several0/mr-mae", "mr-mae-b16"],
        ["again/mr-mae", "mr-mae-b16"],
        ["milan", "milan-b16"],
    ]
    assert [row[6] for row in rows] == ["62.5%", "87.5%", ""]


def test_probes_of_other_images_are_apart(runs, tmp_path):
    """Probes of other images have a chart of their own, also within one run."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(probe_line(12, 0.25, images="b"))
    run(folder, "-o", tmp_path / "a.html")
    labels = re.findall(r'aria-label="Probe: [^"]* by epoch: ([^"]+)"', (tmp_path / "a.html").read_text())
    assert labels == ["cls/20 from 50 to 62.5; mean/20 from 25 to 31.25", "cls/20 from 25 to 25; mean/20 from 12.5 to 12.5"]


def test_evaluations_of_one_run(runs, records, tmp_path):
    """A run's page has its evaluations; those in its own folder are found unasked, and known by their weights if they moved."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    run(folder, "-o", tmp_path / "a.html")
    assert "None on record." in (tmp_path / "a.html").read_text()
    weights = Resolver(whats=(str(folder),)).subject(str(folder)).weights
    (folder / "evaluations.jsonl").write_text(
        json.dumps(record("moved", 0.5, checkpoint="/gone/" + CHECKPOINT, weights=weights)) + "\n"
    )
    run(folder, "-o", tmp_path / "b.html")
    assert tables((tmp_path / "b.html").read_text())["knn by the book; val images-v (9)"] == [["run, step 12", "cls", "50.0%"]]
    told = json.loads(run(runs[0], "--evaluations", records, "--json").stdout)
    assert [one["results"]["20"]["mean"] for one in told["evaluations"]] == [0.5, 0.25, 0.99]
    several = json.loads(run(*runs, "--json").stdout)["runs"]
    assert [len(one["probes"]) for one in several] == [2, 2, 0] and [one["config"]["seed"] for one in several] == [0, 7, 0]


def test_a_checkpoint_that_cannot_be_read(runs, tmp_path):
    """A page of a run whose newest checkpoint is damaged has its evaluations, known by their place, and a note says so."""
    folder = shutil.copytree(runs[0], tmp_path / "run")
    (folder / CHECKPOINT).write_bytes(b"damaged")
    (folder / "evaluations.jsonl").write_text(json.dumps(record("a", 0.5, checkpoint=str(folder / CHECKPOINT))) + "\n")
    said = run(folder, "-o", tmp_path / "a.html").stderr
    assert re.search(r"note     run: evaluations are known to be of it by their place alone. .*" + CHECKPOINT, said)
    assert tables((tmp_path / "a.html").read_text())["knn by the book; val images-v (9)"] == [["run, step 12", "cls", "50.0%"]]


def test_a_run_without_steps_is_told(runs, tmp_path):
    """A run that has logged nothing is in the table, not in the charts, and is named."""
    folder = shutil.copytree(runs[2], tmp_path / "empty")
    (folder / "metrics.jsonl").unlink()
    assert "empty has no step logged yet." in run(runs[0], folder, "-o", tmp_path / "a.html").stderr
    html = (tmp_path / "a.html").read_text()
    assert "empty from" not in html and "mr-mae from" in html


def test_every_run_has_a_line_of_its_own():
    """As many runs as a page takes differ in colour or stroke."""
    assert len({STYLES[look] for look in LOOKS}) == len(LOOKS) == MOST_RUNS


def test_names_without_end():
    """Names are told apart by as many folders as it takes."""
    facts = [SimpleNamespace(path=SimpleNamespace(resolve=lambda path=path: path)) for path in map(Path, (
        "/x/a/b/c", "/y/a/b/c", "/y/d"))]  # fmt: skip
    assert names_of(facts) == ["x/a/b/c", "y/a/b/c", "d"]
    assert Evaluations().tables() == []


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["{first}", "{third}", "--crops", "3"], 2, "--crops is about the pictures of one run"),
        (["{first}", "{third}", "--cache", "x"], 2, "--cache is about the pictures of one run"),
        (["{first}", "{third}", "{first}/"], 2, "mr-mae is given twice"),
        (["{first}"] * 19, 2, "19 runs are given; the lines of 18 can be told apart"),
        (["{first}", "{tmp}/none"], 1, "is no run of student-train"),
        (["{first}", "--evaluations", "{tmp}/none"], 1, "none cannot be read as records"),
        (["{first}", "--evaluations", "{first}/metrics.jsonl"], 1, "line 1 is no record of student-eval"),
        (["{second}", "--evaluations", "{records}"], 2, "no record is of .*again/mr-mae. Make one: student-eval knn"),
    ],
)
def test_what_is_wrong_is_said(runs, records, tmp_path, words, code, message):
    """A wrong command is one sentence, and nothing is written."""
    places = {"first": runs[0], "second": runs[1], "third": runs[2], "tmp": tmp_path, "records": records}
    said = run(*(word.format(**places) for word in words), "-o", tmp_path / "a.html", code=code).stderr
    assert re.search(message, said) and list(tmp_path.iterdir()) == []


def test_the_page_is_one_file(page):
    """It loads nothing, and every id in it names one thing."""
    text = page.read_text()
    assert len(text) < 2e6 and not re.search(r"""(src|href)=["'](?!data:|#)""", text) and "url(http" not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(browser, page, width, theme):
    """On a phone and on a desk, light and dark: nothing is asked of the network, nothing sticks out, every chart has words,
    tables that are wide scroll by keyboard, and headings are in order."""
    with opened(browser, page, width, theme) as tab:
        assert tab.evaluate("[...document.querySelectorAll('svg.chart')].every(s => s.getAttribute('aria-label'))")
        scrolled = "[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.getAttribute('aria-label'))"
        assert tab.evaluate(scrolled)
        strokes = tab.evaluate("[...document.querySelectorAll('.swatch path')].map(p => getComputedStyle(p).stroke)")
        assert len(strokes) == 3 == len(set(strokes)) and "none" not in strokes
        dashes = tab.evaluate("[...document.querySelectorAll('.swatch path')].map(p => p.getAttribute('stroke-dasharray'))")
        assert len(set(dashes)) == 3  # told apart without colour, too
