import pandas as pd
import pytest
from matplotlib.colors import same_color
from synthetic import responses, split
from test_figures import TASKS, evaluated, line, texts

from asym import coupling, figures, stats, trends
from asym.imbalance import distinct, dose_response, share_predicts

pytestmark = pytest.mark.usefixtures("drawing")


@pytest.fixture
def dosed():
    """Two tasks; perception lags the more the longer, a bit on the other axes. Each axis holds the study's own dose."""
    doses = [("length", 0.0), ("length", 1.0), ("length", 3.0), ("entropy", 0.5), ("entropy", 1.0)]
    doses += [("difficulty", 0.1), ("difficulty", 0.2)]
    own, parts, logged = {("length", 1.0), ("entropy", 1.0), ("difficulty", 0.1)}, [], []
    for task, (axis, level) in [(t, d) for t in TASKS for d in doses]:
        lag = 0.3 if (axis, level) in own else 0.2 * level
        rates = {"token_averaged": (0.9 - lag, 0.9), "ngdiff": (0.9, 0.9)}
        rows = responses(rates, problems=40, task=task)
        parts.append(rows.assign(axis=axis, level=level, own=(axis, level) in own))
        share = 0.1 if (axis, level) in own or axis == "difficulty" else 0.2 - 0.05 * level
        logged.append({"task": task, "axis": axis, "level": level, "token_share": share})
    logged = pd.DataFrame(logged).assign(loss_perception=1.0, loss_reasoning=2.0, grad_norm_reasoning=1.0)
    return dose_response(pd.concat(parts), logged.assign(grad_norm_perception=1.0))


def test_doses_are_drawn_by_axis_with_the_gap_between_solid_lines(dosed):
    fig = trends.dose_response(dosed)
    assert [ax.get_title() for ax in fig.axes[::3]] == ["Sudoku", "Graph Coloring"]
    assert [label.get_text() for label in fig.axes[3].get_xticklabels()] == ["0", "1\nstudy", "3"]
    solid = line(fig.axes[0], figures.PERCEPTION)
    found = dosed.set_index(["task", "axis", "response"]).loc["sudoku", "length", "token_averaged a_p"]
    assert solid.get_ydata().tolist() == found.estimate.tolist()
    assert [ax.get_xlabel() for ax in fig.axes[3:]] == list(trends.DOSES.values())


def test_responses_to_a_dose_are_drawn_in_the_same_grid(dosed):
    fig = trends.dose_gains(dosed)
    found = dosed[(dosed.task == "graph_coloring") & (dosed.axis == "difficulty")].set_index("response")
    for color, response in ((figures.QUIET, "gap"), (figures.PERCEPTION, "lag"), (figures.END_TO_END, "gain")):
        assert line(fig.axes[5], color).get_ydata().tolist() == found.estimate[response].tolist()


def test_the_map_of_doses_holds_every_dose_once(dosed):
    fig = trends.dose_map(distinct(dosed)[::-1])
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == [
        *("the study's", "length 0", "length 3", "entropy 0.5", "difficulty 0.2")
    ]
    gaps = distinct(dosed)
    gaps = gaps[(gaps.response == "gap") & (gaps.task == "sudoku")].sort_values("own", ascending=False, kind="stable")
    expected = [f"{row.estimate:+.0f}" + "*" * (row.low > 0 or row.high < 0) for row in gaps.itertuples()]
    assert texts(fig.axes[0])[::2] == expected
    assert expected[0].endswith("*")


def test_shares_are_drawn_against_the_lag_with_their_rank_correlation(dosed):
    once = distinct(dosed)
    agreement = share_predicts(once)
    fig = trends.share_predicts_lag(once, agreement)
    assert [ax.get_xlabel() for ax in fig.axes[3:]] == [f"share of {x} (%)" for x in ("tokens", "loss", "gradient")]
    lags = once[(once.response == "lag") & (once.task == "sudoku")]
    both = [part.token_share.corr(part.estimate, "spearman") for part in (lags[lags.axis != "difficulty"], lags)]
    assert fig.axes[0].get_title() == f"Sudoku\nρ = {both[0]:.2f} (all doses {both[1]:.2f})"
    assert len(lags) == 5
    of_tokens = agreement.set_index(["response", "task", "share"]).loc[("lag", "sudoku", "token_share")]
    assert of_tokens.rho.tolist() == pytest.approx(both)
    assert of_tokens.doses.tolist() == [4, 5]


def test_the_frontier_puts_every_arm_at_its_weight():
    table = stats.measures(evaluated())
    weights = {"token_averaged": 0.1, "lambda_0.5": 0.5, "ngdiff": 0.3}
    weights = pd.Series({(task, arm): weight for task in TASKS for arm, weight in weights.items()})
    fig = trends.frontier(table, weights)
    top, bottom = fig.axes[0], fig.axes[2]
    assert [ax.get_title() for ax in fig.axes[:2]] == ["Sudoku", "Graph Coloring"]
    swept = top.lines[0].get_xydata()
    points = table[(table.task == "sudoku") & (table.measure == "a")].set_index("arm").estimate
    assert swept.tolist() == [[0.1, points["token_averaged"]], [0.5, points["lambda_0.5"]]]
    assert {tuple(xy) for drawn in top.lines for xy in drawn.get_xydata()} >= {(0.3, points["ngdiff"])}
    assert texts(top) == ["token-averaged", "NGDiff"]
    assert line(bottom, figures.PERCEPTION).get_xdata().tolist() == [0.1, 0.5]
    assert bottom.get_xlabel() == "weight of perception λ"


@pytest.mark.parametrize("arms", [["start"], ["start", "base"]])
def test_coupling_is_drawn_beside_the_null(arms):
    rollouts = split(evaluated(arms=dict.fromkeys(arms, (0.6, 0.5)), rollouts=4))
    table = coupling.coupling_table(*rollouts, resamples=50)
    fig = trends.coupling_vs_null(table)
    ax = fig.axes[0]
    assert ax.get_xlabel() == "correlation r"
    assert len(ax.get_yticks()) == 4 * len(arms)
    first = table[(table.task == "sudoku") & (table.arm == figures.ordered(arms)[0])]
    first = first[(first.reading == "counterfactual") & (first.scope == "pooled")].set_index("pair")
    measured, null, forgiving = ax.lines[:3]
    assert measured.get_xdata()[0] == first.r["outcome~perception"]
    assert null.get_xdata()[0] == first.null["outcome~perception"]
    assert forgiving.get_xdata()[0] == first.forgiving["outcome~perception"]
    assert same_color(measured.get_color(), figures.PERCEPTION)
    assert same_color(ax.lines[3].get_color(), figures.REASONING)


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
    drawn = [
        (each.get_xdata().astype(float).round(1).tolist(), each.get_ydata().tolist()) for each in fig.axes[0].lines
    ]
    assert ([0, 0.5, 1], [40, 50, 60]) in drawn
    assert ([0, 0.5], [40, 55]) in drawn
    plain = trends.alpha_frontier(table[~table.arm.str.startswith("graded")].assign(low=0.0, high=90.0))
    told = [[text.get_text() for text in each.legends[0].get_texts()] for each in (fig, plain)]
    assert set(told[0]) - set(told[1]) == {"exact a_p paid", "graded a_p paid"}
