import pandas as pd
import pytest
from synthetic import responses
from test_figures import TASKS, line, texts

from asym import figures, stats, trends
from asym.imbalance import dose_response

pytestmark = pytest.mark.usefixtures("drawing")


@pytest.fixture
def dosed():
    """Two tasks, two axes with two doses; perception lags the more the higher the dose."""
    parts = []
    for task, axis, level in [(t, a, k) for t in TASKS for a in ("length", "entropy") for k in (0.0, 1.0)]:
        rates = {"token_averaged": (0.8 - 0.5 * level, 0.9), "ngdiff": (0.9, 0.9)}
        parts.append(responses(rates, problems=40, task=task).assign(axis=axis, level=level))
    logged = pd.MultiIndex.from_product(
        [TASKS, ["length", "entropy"], [0.0, 1.0]], names=["task", "axis", "level"]
    ).to_frame(index=False)
    logged = logged.assign(token_share=0.2 - 0.1 * logged.level, loss_perception=1.0, loss_reasoning=2.0)
    return dose_response(pd.concat(parts), logged.assign(grad_norm_perception=1.0, grad_norm_reasoning=1.0))


def test_doses_are_drawn_by_axis_with_the_gap_between_solid_lines(dosed):
    fig = trends.dose_response(dosed)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["Sudoku, length", "Sudoku, entropy"]
    solid = line(fig.axes[0], figures.PERCEPTION)
    found = dosed.set_index(["task", "axis", "response"]).loc["sudoku", "length", "token_averaged a_p"]
    assert solid.get_xdata().tolist() == [0, 1]
    assert solid.get_ydata().tolist() == found.estimate.tolist()


def test_the_map_of_doses_holds_gap_and_gain(dosed):
    fig = trends.dose_map(dosed)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == [
        *("length 0", "length 1", "entropy 0", "entropy 1")
    ]
    gaps = dosed[(dosed.response == "gap") & (dosed.task == "sudoku")]
    expected = [f"{row.estimate:+.0f}" + "*" * (row.low > 0 or row.high < 0) for row in gaps.itertuples()]
    assert texts(fig.axes[0])[::2] == expected
    assert expected[1].endswith("*")


def test_shares_are_drawn_against_the_gap_with_their_rank_correlation(dosed):
    fig = trends.share_predicts_gap(dosed)
    assert [ax.get_xlabel().split(" of ")[1] for ax in fig.axes] == ["tokens (%)", "loss (%)", "gradient (%)"]
    lines = []
    for task, name in (("sudoku", "Sudoku"), ("graph_coloring", "Graph Coloring")):
        gaps = dosed[(dosed.response == "gap") & (dosed.task == task)]
        lines.append(f"{name}: ρ = {gaps.token_share.corr(gaps.estimate, method='spearman'):.2f}")
    assert fig.axes[0].get_title() == "\n".join(lines)


def test_the_null_map_is_dark_only_where_both_ranges_hold():
    fig = trends.null_map((0.34, 0.43), (0.65, 1.0))
    both = fig.axes[0].collections[2]
    assert [patch.get_label() for patch in fig.legends[0].get_patches()][-1] == "both"
    p, q = both.get_paths()[0].vertices.mean(0)
    perception, reasoning = stats.null_correlations(p, q)
    assert 0.3 < perception < 0.47
    assert reasoning > 0.6
    assert p > q


def test_gradient_directions_stand_in_one_order_with_their_intervals():
    rewards = ["validity", "perception", "outcome"]
    index = pd.MultiIndex.from_product(
        [TASKS, rewards, ["cosine", "signal_to_noise"]], names=["task", "reward", "measure"]
    )
    table = index.to_frame(index=False).assign(family="f", estimate=0.4, low=0.2, high=0.5, n=16, seeds=1)
    fig = trends.gradient_directions(table)
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert names == ["exact perception", "outcome only", "validity"]
    assert line(fig.axes[0], figures.PERCEPTION).get_xdata().tolist() == [0.4]


def test_the_alpha_frontier_joins_outcome_only_and_the_weights_in_order():
    arms = {"outcome": 40.0, "alpha_1": 60.0, "alpha_0.5": 50.0, "graded_0.5": 55.0, "validity": 10.0}
    index = pd.MultiIndex.from_product([TASKS, arms, ["a", "a_p", "a_r"]], names=["task", "arm", "measure"])
    table = index.to_frame(index=False).assign(family="f", n=16, seeds=1)
    table["estimate"] = table.arm.map(arms)
    fig = trends.alpha_frontier(table.assign(low=table.estimate - 1, high=table.estimate + 1))
    drawn = [(each.get_xdata().tolist(), each.get_ydata().tolist()) for each in fig.axes[0].lines]
    assert ([0, 0.5, 1], [40, 50, 60]) in drawn
    assert ([0, 0.5], [40, 55]) in drawn
