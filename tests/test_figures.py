import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color
from PIL import Image
from synthetic import responses, split

from asym import claims, figures, forest, stats

pytestmark = pytest.mark.usefixtures("drawing")

SFT = {"base": (0.2, 0.1), "ngdiff": (0.9, 0.8), "lambda_0.5": (0.8, 0.8), "token_averaged": (0.4, 0.9)}
TASKS = ["sudoku", "graph_coloring"]


def evaluated(tasks=TASKS, arms=SFT, **options) -> pd.DataFrame:
    return pd.concat([responses(arms, problems=30, task=task, **options) for task in tasks])


def metrics(columns, arms, seeds=(0,), steps=12) -> pd.DataFrame:
    index = pd.MultiIndex.from_product([TASKS, arms, seeds, range(steps)], names=["task", "arm", "seed", "step"])
    frame = index.to_frame(index=False)
    return frame.assign(**{c: np.random.default_rng(i).uniform(0.1, 1, len(frame)) for i, c in enumerate(columns)})


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def line(ax, color):
    return next(drawn for drawn in ax.lines if same_color(drawn.get_color(), color))


def test_accuracy_curves_have_a_line_per_measure():
    curves = metrics(["a_p", "a_r", "a"], ["ngdiff", "token_averaged"], seeds=(0, 1), steps=3)
    fig = figures.accuracy_curves(curves)
    ax = fig.axes[0]
    assert ax.get_title() == "Sudoku, token-averaged"
    expected = curves[(curves.task == "sudoku") & (curves.arm == "token_averaged")].groupby("step").a_p.mean()
    assert line(ax, figures.PERCEPTION).get_ydata().tolist() == pytest.approx(expected.tolist())
    assert set(texts(ax)) == {"perception", "reasoning", "end to end"}
    goals = pd.Series({"sudoku": 0.3, "graph_coloring": 0.6}, name="the goal")
    fig = figures.accuracy_curves(curves, goals)
    drawn = fig.axes
    assert fig.get_suptitle().endswith("dashed: the goal")
    assert [ax.lines[-1].get_ydata()[0] for ax in drawn] == [0.3, 0.6, 0.3, 0.6]


@pytest.mark.parametrize("tasks", [TASKS, ["sudoku"]])
def test_accuracy_bars_are_as_high_as_the_table_says(tasks):
    table = stats.measures(evaluated(tasks))
    fig = figures.accuracy_bars(table)
    assert [ax.get_title() for ax in fig.axes] == [figures.TASKS[task] for task in tasks]
    estimates = table.set_index(["task", "arm", "measure"]).estimate
    for ax, task in zip(fig.axes, tasks, strict=True):
        assert ax.get_xlabel() == "accuracy (points)"
        names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert names == ["base", "token-averaged", "λ = 0.5", "NGDiff"]
        for bars, measure, color in zip(
            ax.containers, ["a_p", "a_r", "a"], [figures.PERCEPTION, figures.REASONING, figures.END_TO_END], strict=True
        ):
            for bar, arm in zip(bars, ["base", "token_averaged", "lambda_0.5", "ngdiff"], strict=True):
                assert bar.get_width() == pytest.approx(estimates[task, arm, measure])
                assert same_color(bar.get_facecolor(), color)
    assert [text.get_text() for text in fig.legends[0].texts] == ["perception", "reasoning", "end to end"]


def test_gains_by_reading_are_bars_that_add_up():
    table = stats.gain_by_reading(
        responses({"token_averaged": (0.4, 0.8), "ngdiff": (0.7, 0.8)}), "ngdiff", "token_averaged", 20
    )
    fig = figures.gain_by_reading(table, "token_averaged")
    (ax,) = fig.axes
    assert [bar.get_width() for bar in ax.patches] == table.estimate.tolist()
    assert ax.get_title() == f"Sudoku: {table.estimate.sum():+.1f} in all"
    assert "NGDiff over token-averaged" in fig.get_suptitle()


def test_gain_bars_show_paired_gains():
    table = stats.gains(evaluated(seeds=(0, 1)), "base")
    fig = figures.gain_bars(table, "base")
    assert "Gain over base (30 problems, 2 seeds)" in fig.get_suptitle()
    lengths = [bar.get_width() for bar in fig.axes[0].containers[0]]
    expected = table[(table.task == "sudoku") & (table.measure == "a_p")].set_index("arm").estimate
    assert lengths == pytest.approx(list(expected[["token_averaged", "lambda_0.5", "ngdiff"]]))


def test_a_title_tells_where_arms_have_unlike_numbers_of_seeds():
    assert figures.seeded(pd.Series([2, 2])) == "2 seeds"
    assert figures.seeded(pd.Series([3.0, 1.0, 0.0])) == "1 to 3 seeds"


def test_eight_arms_are_drawn_in_order():
    arms = ["outcome", "alpha_1", "alpha_0.25", "start", "validity", "solver_blindfold", "group_agreement", "new_arm"]
    assert figures.ordered(arms) == [
        *("start", "outcome", "alpha_0.25", "alpha_1"),
        *("solver_blindfold", "validity", "group_agreement", "new_arm"),
    ]
    fig = figures.accuracy_bars(stats.measures(evaluated(arms=dict.fromkeys(arms, (0.5, 0.5)))))
    assert len(fig.axes[0].containers[0]) == 8
    assert figures.display("new_arm") == "new arm"


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_training_curves_show_both_losses_in_their_colours(seeds):
    table = metrics(["loss_perception", "loss_reasoning"], ["ngdiff", "token_averaged"], seeds)
    fig = figures.training_curves(table)
    assert [ax.get_title() for ax in fig.axes[::2]] == ["Sudoku, token-averaged", "Sudoku, NGDiff"]
    assert fig.get_supylabel() == "nats per token"
    assert fig.get_supxlabel() == "step"
    ax = fig.axes[0]
    assert sorted(texts(ax)) == ["perception", "reasoning"]
    part = table[(table.task == "sudoku") & (table.arm == "token_averaged")]
    for color, column in ((figures.PERCEPTION, "loss_perception"), (figures.REASONING, "loss_reasoning")):
        np.testing.assert_allclose(line(ax, color).get_ydata(), part.groupby("step")[column].mean())


def test_reward_curves_show_a_surrogate_only_where_it_is_paid():
    table = metrics(["reward_outcome", "reward_perception", "reward_format"], ["outcome", "validity"], steps=4)
    table["reward_validity"] = 0.5  # logged in every arm
    fig = figures.reward_curves(table)
    assert sorted(texts(fig.axes[0])) == ["format", "outcome", "perception"]
    assert sorted(texts(fig.axes[2])) == ["format", "outcome", "perception", "the surrogate it is paid"]
    assert line(fig.axes[0], figures.PERCEPTION).get_marker() == "o"  # four steps are four points, not a curve


def test_rewards_of_many_steps_are_running_means():
    table = metrics(["reward_outcome", "reward_perception"], ["outcome"], steps=30)
    fig = figures.reward_curves(table)
    one = table[(table.task == "sudoku") & (table.seed == table.seed.min())].sort_values("step")
    means = table[table.task == "sudoku"].groupby("step").reward_perception.mean()
    drawn = line(fig.axes[0], figures.PERCEPTION).get_ydata()
    assert len(drawn) == one.step.nunique()
    assert drawn[1:-1] == pytest.approx(means.rolling(3, center=True).mean().to_numpy()[1:-1])
    assert "running mean of 3 steps" in fig.get_suptitle()


def test_no_line_leaves_its_panel_whichever_is_drawn_first():
    table = metrics(["reward_outcome", "reward_perception", "reward_format"], ["outcome", "validity"], steps=6)
    table.loc[table.arm == "validity", "reward_outcome"] += 5
    low, high = figures.reward_curves(table).axes[0].get_ylim()
    assert low < table[["reward_outcome", "reward_perception"]].min().min()
    assert high > table.reward_outcome.max()


def test_names_at_the_ends_of_lines_do_not_cover_each_other():
    table = metrics(["reward_outcome", "reward_perception", "reward_format"], ["outcome"])
    table.loc[:, table.columns.str.startswith("reward_")] = 0.5
    ax = figures.reward_curves(table).axes[0]
    offsets = sorted(text.get_position()[1] for text in ax.texts)
    assert np.diff(offsets) == pytest.approx([17, 17], abs=1e-6)


def test_many_arms_stand_in_rows_of_five_for_each_task():
    weights = [f"lambda_{k / 10:g}" for k in range(1, 7)]
    curves = metrics(["a_p", "a_r", "a"], ["token_averaged", *weights], steps=3)
    fig = figures.accuracy_curves(curves)
    shown = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == 2 * ["token-averaged", *(f"λ = 0.{k}" for k in range(1, 7))]
    assert [ax.get_ylabel() for ax in shown[::7]] == ["Sudoku", "Graph Coloring"]
    expected = curves[(curves.task == "graph_coloring") & (curves.arm == "lambda_0.6")].a_r
    np.testing.assert_allclose(line(shown[-1], figures.REASONING).get_ydata(), expected)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["perception", "reasoning", "end to end"]


def test_lambda_path_shows_only_steps_with_gradient_norms():
    columns = ["lambda", "grad_norm_perception", "grad_norm_reasoning", "grad_cosine"]
    table = metrics(columns, ["token_averaged", "ngdiff"]).assign(token_share=0.07)
    table.loc[table.arm != "ngdiff", columns[1:]] = np.nan
    fig = figures.lambda_path(table)
    assert [ax.get_ylabel() for ax in fig.axes[::2]] == ["λ", "gradient norm", "cosine"]
    expected = table[(table.task == "sudoku") & (table.arm == "ngdiff")]
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), expected["lambda"])
    np.testing.assert_allclose(fig.axes[0].lines[1].get_ydata(), 0.07)
    np.testing.assert_allclose(line(fig.axes[2], figures.PERCEPTION).get_ydata(), expected.grad_norm_perception)


def test_shares_are_dots_at_one_step_and_lines_over_several():
    table = metrics(["token_share", "loss_share", "gradient_share"], ["base", "token_averaged"], range(3))
    table = table[(table.arm != "base") | (table.step == 0)]
    fig = figures.shares(table)
    dots, curves = fig.axes[0], fig.axes[2]
    assert [label.get_text() for label in dots.get_xticklabels()] == ["tokens", "loss", "gradient"]
    np.testing.assert_allclose(
        sorted(dots.collections[0].get_offsets()[:, 1]),
        sorted(100 * table[(table.arm == "base") & (table.task == "sudoku")].token_share),
    )
    assert sorted(texts(curves)) == ["gradient", "loss", "tokens"]
    assert fig.get_supylabel() == "share (%)"


def test_claims_are_drawn_by_unit_and_verdict():
    rollouts, counterfactual = split(evaluated(arms={"start": (0.6, 0.5)}, rollouts=4))
    table = claims.claims(sft_rows=evaluated(), rollouts=rollouts, counterfactual=counterfactual, resamples=50)
    fig = forest.claims_forest(table)
    assert [ax.get_xlabel() for ax in fig.axes] == ["points", "points", "r", "r"]
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert names[0].startswith("C1 ")
    assert " not run" in texts(fig.axes[0])
    c1 = table[(table.claim == "C1") & (table.task == "sudoku")].iloc[0]
    assert any(drawn.get_xdata()[0] == c1.estimate for drawn in fig.axes[0].lines)
    assert set(table.claim) <= set(forest.CLAIMS)
    assert len(forest.claims_forest(table[table.claim == "C1"]).axes) == 2


def test_samples_fill_a_grid():
    images = [Image.new("RGB", (8, 8))] * 5
    fig = figures.samples(images, list("abcde"))
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "c", "d", "e", "", "", ""]


def test_saving_writes_the_same_bytes_each_time_and_leaves_no_partial_file(tmp_path):
    table = stats.measures(evaluated(["sudoku"]))
    for name in ("one", "two"):
        figures.save(figures.accuracy_bars(table), tmp_path / "new" / name)
    written = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert sorted(written) == ["one.png", "one.svg", "two.png", "two.svg"]
    assert written["one.svg"] == written["two.svg"]
    assert written["one.png"] == written["two.png"]
    assert b"<dc:date>" not in written["one.svg"]
