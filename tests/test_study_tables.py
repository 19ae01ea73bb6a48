"""The study's table of cells, what may be claimed of results, and the page that is made of records."""

from __future__ import annotations

from dataclasses import replace

import pytest
from study_fakes import made_record

from pipelines.presets import recipe
from pipelines.study import records
from pipelines.study.cells import CODES, CURVE, GROUPS, METHODS, SWITCHES, VIEWS, Cell, cells_of, overrides, wall_epochs
from pipelines.study.picture import draw
from pipelines.study.statistics import Values, orderings, pooled_deviation, sign
from pipelines.study.tables import Found, advice, page_of
from student.config import with_overrides
from teacher_cache.errors import UsageError


def test_cells_are_named_apart():
    """Each cell has a name of its own, and all groups together are `all`."""
    every = cells_of("all", (0, 1))
    assert len({cell.name for cell in every}) == len(every)
    assert {cell for group in GROUPS for cell in cells_of(group, (0, 1))} == set(every)
    assert len({Cell(CURVE, views=views, code=code).name for views in VIEWS for code in CODES}) == len(VIEWS) * len(CODES)


def test_the_order_is_that_of_the_protocol():
    """Methods come first, then the promised corner of views and codes, then live teachers; a seed is whole before the next."""
    every = cells_of("all", (0, 1))
    places = {cell: place for place, cell in enumerate(every)}
    last_method = max(places[Cell(method, seed)] for method in METHODS for seed in (0, 1))
    assert last_method < places[Cell(CURVE, 0, 4, "klt:3")] < places[Cell(CURVE, 0, source="fresh")]
    assert places[Cell(CURVE, 1, 1, "klt:1.25")] < places[Cell(CURVE, 0, source="fresh")] < places[Cell(CURVE, 0, 8, "int8")]
    assert max(places[Cell(method, 0)] for method in METHODS) < min(places[Cell(method, 1)] for method in METHODS)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_change_their_preset(switch):
    """The settings of an ablation are settings of its method, and change it."""
    cell = Cell(SWITCHES[switch].method, 3, switch=switch)
    plain, changed = ([change.split("=", 1) for change in overrides(c, 8, 64)] for c in (replace(cell, switch=""), cell))
    base = recipe(cell.preset).config
    one, other = with_overrides(base, dict(plain)), with_overrides(base, dict(changed))
    assert (one.seed, one.epochs, one.optim.warmup_epochs) == (3, 8, 1.0)
    assert (one == other) == (switch == "raw")


def test_all_students_end_on_the_grid_of_the_teacher():
    """Of every method the student has the 8 x 8 patches of the teacher, and the training of all others."""
    configs = [recipe(preset).config for preset in METHODS.values()]
    assert {config.backbone.grid for config in configs} == {(8, 8)} and len({config.optim for config in configs}) == 1
    assert len({(config.epochs, config.batch_size) for config in configs}) == 1


@pytest.mark.parametrize("group, seeds", [("nonsense", (0,)), ("all", ()), ("all", (1, 1)), ("all", (-1,))])
def test_unknown_groups_and_seeds(group, seeds):
    """What is no group, or no seeds, is refused."""
    with pytest.raises(UsageError, match="--cells|--seeds"):
        cells_of(group, seeds)


def test_epochs_of_equal_wall_time():
    """A method that is three times as slow has a third of the epochs; one that is about as fast has had its time."""
    assert wall_epochs(9, 30.0, 10.0) == 3 and wall_epochs(8, 5.0, 10.0) == 16
    assert wall_epochs(8, 10.9, 10.0) == 8 and wall_epochs(2, 1000.0, 10.0) == 1
    with pytest.raises(UsageError, match="No epochs"):
        wall_epochs(8, 0.0, 10.0)


def test_an_ordering_needs_two_seeds_and_two_deviations():
    """Means count as ordered beyond two pooled deviations of cells with two seeds, and not at two."""
    near, far, one = Values((0.50, 0.52)), Values((0.60, 0.62)), Values((0.9,))
    deviation = pooled_deviation([near, far, one])
    assert deviation == pytest.approx(0.02 / 2**0.5)
    assert sign(far, near, deviation) == ">" and sign(near, far, deviation) == "<" and sign(one, near, deviation) == "~"
    assert sign(Values((0.53, 0.53)), near, 0.010001) == "~" and sign(Values((0.53, 0.53)), near, 0.0099) == ">"
    assert orderings({"near": near, "far": far, "one": one}) == ["far > near"]
    assert pooled_deviation([one]) is None and orderings({"one": one}) == []


@pytest.fixture
def made() -> dict[str, dict]:
    """Two seeds of a curve on which more views and more bits are better, but for klt:3, which is as good as int8."""
    sizes = {"int8": 4000.0, "klt:3": 1500.0, "klt:1.25": 700.0}
    level = {"int8": 0.50, "klt:3": 0.499, "klt:1.25": 0.40}
    cells = [(Cell(CURVE, seed, views, code), level[code] + 0.01 * views + 0.002 * seed, sizes[code])
             for code in sizes for views in (1, 4) for seed in (0, 1)]  # fmt: skip
    found = [made_record(cell, value, target_bytes=size) for cell, value, size in cells]
    found += [made_record(Cell("mae", seed), 0.3 + 0.002 * seed, seconds=20.0) for seed in (0, 1)]
    found += [made_record(Cell(CURVE, seed, switch="random-masks"), 0.5 + 0.002 * seed) for seed in (0, 1)]
    return {record["name"]: record for record in found}


def test_the_page(made):
    """The page has what the records say: means, orderings, signs, and the names of what is missing."""
    page = page_of(made, "study.png")
    assert "| maskalign | 4 | 54.1 ± 0.1 | 53.1 ± 0.1 | 54.1 ± 0.1 |  | 10 | 4 |" in page
    assert "maskalign > mae" in page and "![Accuracy against bytes an image](study.png)" in page
    assert "| maskalign | attentive masks against random ones | kNN | 54.1 ± 0.1 | 50.1 ± 0.1 | > |" in page
    assert "| klt:3 | 4 | 1,500 | 6,400 | 54.0 ± 0.1 |" in page
    missing = page.split("### Missing cells")[1]
    assert "`milan-self-v4-int8-s0`" in missing and "`mae-v4-s0`" not in missing and "`maskalign-self-fresh-s1`" in missing


def test_the_advice(made):
    """Within a budget the smallest cell counts that is not worse than the best one: klt:3 in the place of int8."""
    lines = [(budget, code, views) for budget, code, views, _ in advice(Found(made))]
    assert lines == [(4, "klt:3", 1), (8, "klt:3", 4), (16, "klt:3", 4), (32, "klt:3", 4), (64, "klt:3", 4), (128, "klt:3", 4),
                     (256, "klt:3", 4), (512, "klt:3", 4)]  # fmt: skip
    del made[Cell(CURVE, 0, 4, "klt:3").name], made[Cell(CURVE, 1, 4, "klt:3").name]
    assert [line[1:3] for line in advice(Found(made))[:3]] == [("klt:3", 1), ("klt:3", 1), ("klt:3", 1)]
    assert advice(Found(made))[3][1:3] == ("int8", 4)


def test_the_plot(made, tmp_path):
    """The plot is drawn where a point of the curve is on record, says every code that is, and is not drawn where none is."""
    assert draw(made, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- klt:1.25 -->" in text and "<!-- int4 -->" not in text
    alone = {name: record for name, record in made.items() if record["cell"]["method"] == "mae"}
    assert not draw(alone, tmp_path / "b.png") and not (tmp_path / "b.png").exists()


def test_records_are_checked(made, tmp_path):
    """A record comes back as it was written; what is none, or of another study, is refused with its name."""
    for record in made.values():
        records.write(tmp_path, record)
    assert records.read_all(tmp_path) == made
    other = {**made["mae-v4-s0"], "study": {"scale": "another"}}
    records.write(tmp_path, other)
    with pytest.raises(UsageError, match="of 2 studies"):
        records.read_all(tmp_path)
    records.record_path(tmp_path, "mae-v4-s0").write_text("{}")
    with pytest.raises(UsageError, match=r"mae-v4-s0.json is no record of a cell \(it lacks 'format'\)"):
        records.read_all(tmp_path)
    with pytest.raises(UsageError, match="holds no records"):
        records.read_all(tmp_path / "none")
