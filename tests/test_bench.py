"""What the benchmark does, not how fast: no test here knows a time."""

import numpy as np
import pytest

from asym import bench, growth, trends
from asym.runs import Run


@pytest.fixture
def study(tiny, base, root, monkeypatch):
    """Tiny parameters, a start and a scratch folder."""
    monkeypatch.setattr(bench, "PROMPTS", 2)
    monkeypatch.setattr(bench, "GROUP", 4)
    return tiny(n_train_sft=64, n_validation=4), Run(base.folder, base.config), "sudoku", 1, root / "scratch"


def test_rates_are_measured_in_turns_and_compared_round_by_round():
    order, rates = [], {"ours": iter([9, 4.0, 6.0]), "baseline": iter([9, 2.0, 1.0])}
    ours, baseline = (lambda name=name: order.append(name) or next(rates[name]) for name in rates)
    line = bench.compare("work", "x/s", ours, baseline, 2, ">= 2", limit="none")
    assert order == ["ours", "baseline"] * 3  # the first round does not count
    assert line == {
        **{"work": "work", "ours": 5.0, "baseline": 1.5, "unit": "x/s"},
        **{"ratio": 4.0, "ratio_low": 2.0, "ratio_high": 6.0, "target": ">= 2", "limit": "none"},
    }


@pytest.mark.parametrize("part", [bench.training_lines, bench.rl_lines, bench.evaluation_lines])
def test_every_part_measures_ours_and_the_stock_way(study, part):
    lines = part(*study)
    assert lines
    for line in lines:
        assert set(line) == set(bench.COLUMNS)
        assert line["ours"] > 0 < line["baseline"]
        assert line["ratio_low"] <= line["ratio"] <= line["ratio_high"]


def test_growth_follows_one_size_at_a_time(study, monkeypatch):
    monkeypatch.setattr(growth, "MIDDLE", {"response tokens": 4, "batch": 2, "group": 2, "width": 32})
    small = {"response tokens": (4, 8), "batch": (1, 2), "group": (1, 2), "width": (32, 64)}
    monkeypatch.setattr(growth, "SIZES", small)
    p, start, _, rounds, _ = study
    table = growth.growth(p, start, rounds)
    assert table.groupby("work").axis.apply(set).to_dict() == {
        "SFT step": {"response tokens", "batch", "parameters"},
        "rollouts": {"response tokens", "batch", "group", "parameters"},
    }
    assert (table.groupby(["work", "axis"])["size"].count() == 2).all()
    for _, part in table.groupby(["work", "axis"]):
        slope = np.diff(np.log(part.seconds)) / np.diff(np.log(part["size"]))
        assert part.exponent.to_numpy() == pytest.approx([*slope, *slope], abs=0.2)  # seconds are rounded
    fig = trends.cost_growth(table)
    assert [ax.get_xlabel() for ax in fig.axes] == ["response tokens", "batch", "group", "parameters"]


def test_synthesis_is_measured_beside_two_libraries(study):
    pytest.importorskip("reasoning_gym")  # an extra of its own: it wants a compiler
    lines = bench.synthesis_lines(*study)
    assert [bool(line.get("baseline")) for line in lines] == [True, True, False, False]
    assert all(line["ours"] > 0 for line in lines)
