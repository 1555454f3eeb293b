import math

import numpy as np
import pandas as pd
import pytest
from synthetic import responses, split

from asym import coupling, stats

COLUMNS = ["task", "family", "arm", "reading", "scope", "pair", "r", "low", "high", "n", "seeds", "p", "q"]
COLUMNS += ["f", "null", "forgiving"]


@pytest.fixture(scope="module")
def rollouts():
    return split(responses({"start": (0.6, 0.5)}, problems=150, rollouts=8))


def test_independent_halves_couple_as_the_null_model_says(rollouts):
    table = coupling.coupling_table(*rollouts)
    assert list(table.columns) == COLUMNS
    assert len(table) == 2 * 2 * 2
    assert ((table.low - 0.02 < table.null) & (table.null < table.high + 0.02)).all()
    own = table[(table.reading == "own") & (table.scope == "pooled")].set_index("pair")
    end_to_end = rollouts[0]
    assert own.r["outcome~perception"] == pytest.approx(np.corrcoef(end_to_end.a, end_to_end.a_p)[0, 1], abs=1e-6)
    assert own.r["outcome~reasoning"] == pytest.approx(np.corrcoef(end_to_end.a, end_to_end.a_own)[0, 1], abs=1e-6)
    assert own.p.iloc[0] == pytest.approx(end_to_end.a_p.mean(), abs=1e-6)
    assert own.q.iloc[0] == pytest.approx(end_to_end.a_own.mean(), abs=1e-6)


def test_without_counterfactual_rollouts_only_the_own_reading_is_given(rollouts):
    assert set(coupling.coupling_table(rollouts[0]).reading) == {"own"}


def test_the_counterfactual_reading_keeps_the_outcome_of_rollouts_that_saw_right(rollouts):
    paired = coupling.counterfactual_reading(*rollouts)
    saw = paired.a_p == 1
    assert (paired.reasoning[saw] == paired.a[saw]).all()
    assert (paired.reasoning[~saw] == paired.given[~saw]).all()
    assert paired.reasoning.mean() == pytest.approx(0.5, abs=0.05)


def test_rollouts_without_a_counterfactual_partner_are_left_out(rollouts):
    end_to_end, counterfactual = rollouts
    assert len(coupling.counterfactual_reading(end_to_end, counterfactual[counterfactual["rollout"] < 3])) == 150 * 3


def test_a_rollout_given_twice_is_refused(rollouts):
    with pytest.raises(pd.errors.MergeError):
        coupling.counterfactual_reading(pd.concat([rollouts[0]] * 2), rollouts[1])


def test_the_gap_is_the_difference_of_the_two_correlations(rollouts):
    table = coupling.coupling_table(*rollouts)
    rows = table[(table.reading == "counterfactual") & (table.scope == "pooled")].set_index("pair")
    gap, beyond, beyond_forgiveness = coupling.coupling_gap(coupling.counterfactual_reading(*rollouts))
    assert gap.estimate == pytest.approx(rows.r["outcome~reasoning"] - rows.r["outcome~perception"], abs=1e-5)
    null = rows.null["outcome~reasoning"] - rows.null["outcome~perception"]
    assert beyond.estimate == pytest.approx(gap.estimate - null, abs=1e-5)
    assert beyond_forgiveness == beyond  # nothing is forgiven here
    assert gap.low > 0  # p > q: base rates alone make the outcome follow reasoning
    assert beyond.low < 0.01
    assert beyond.high > -0.01


def test_base_rates_alone_decide_the_sign_of_the_gap():
    sees_worse = coupling.counterfactual_reading(*split(responses({"start": (0.4, 0.8)}, rollouts=4)))
    assert coupling.coupling_gap(sees_worse)[0].high < 0


def test_a_null_that_forgives_explains_what_forgiveness_does():
    """Right answers to a third of the wrong perceptions, whatever the reasoning: beyond one null, not the other."""
    end_to_end, counterfactual = split(responses({"start": (0.5, 0.5)}, problems=400, rollouts=8))
    lucky = np.random.default_rng(1).random(len(end_to_end)) < 1 / 3
    end_to_end = end_to_end.assign(a=end_to_end.a.mask(lucky & (end_to_end.a_p == 0), 1.0))
    _, beyond, beyond_forgiveness = coupling.coupling_gap(coupling.counterfactual_reading(end_to_end, counterfactual))
    assert beyond.low > 0.1
    assert beyond_forgiveness.low < 0 < beyond_forgiveness.high
    table = coupling.coupling_table(end_to_end, counterfactual)
    assert table.f.iloc[0] == pytest.approx(1 / 3, abs=0.05)
    seen = table[(table.reading == "counterfactual") & (table.scope == "pooled")]
    assert ((seen.low < seen.forgiving) & (seen.forgiving < seen.high)).all()


def test_training_problems_of_two_seeds_are_different_problems():
    rows = pd.concat(
        [responses({"start": (0.5, 0.5)}, problems=20, rollouts=4, stream=s).assign(seed=s) for s in (0, 1)]
    )
    drawn = rows.assign(problem_id="sudoku/train_rl/" + rows.problem_id, ground_truth=rows.seed)
    published = rows.assign(problem_id=drawn.problem_id)  # where no seed draws others
    assert set(coupling.coupling_table(*split(rows), 50).n) == {20}
    assert set(coupling.coupling_table(*split(drawn), 50).n) == {40}
    assert set(coupling.coupling_table(*split(published), 50).n) == {20}


def test_constant_successes_have_no_correlation():
    table = coupling.coupling_table(*split(responses({"start": (1.0, 0.5)}, problems=20, rollouts=2)))
    blind = table[table.pair == "outcome~perception"]
    assert blind[["r", "low", "high", "null"]].isna().all(axis=None)


def test_a_surrogates_say_is_its_share_of_the_variance_that_grpo_scales_to_one():
    """In one group the outcome alone varies, in one the surrogate alone, in one both as one; the last is silent."""
    groups = {
        "outcome": ([0, 1], [1, 1]),
        "surrogate": ([0, 0], [0, 0.01]),
        "both": ([0, 1], [0, 1]),
        "none": ([1, 1],) * 2,
    }
    rows = [
        {
            "task": "sudoku",
            "family": "qwen3_vl",
            "seed": 0,
            "problem_id": name,
            "ground_truth": name,
            "a": a,
            "a_p": a,
            "a_p_graded": a,
            "s": s,
        }
        for name, pairs in groups.items()
        for a, s in zip(*pairs, strict=True)
    ]
    for alpha, shared in ((0.5, 0.5), (0.2, 0.2)):
        found = coupling.screening(pd.DataFrame(rows), ["s"], resamples=10, alpha=alpha)
        assert found.say.tolist() == pytest.approx([(0 + 1 + shared) / 3] * 4)


def test_screening_ranks_surrogates_by_their_correlation_with_perception(rollouts):
    noise = np.random.default_rng(0).random(len(rollouts[0]))
    frame = rollouts[0].assign(reward_exact=rollouts[0].a_p, noisy=lambda r: r.a_p + 2 * noise, constant=1.0)
    table = coupling.screening(frame, ["constant", "noisy", "reward_exact"])
    assert list(table.columns) == [
        "task",
        "family",
        "surrogate",
        "perception",
        "scope",
        "r",
        "low",
        "high",
        "n",
        "seeds",
        "say",
        "rank",
    ]
    assert len(table) == 2 * 2 * 3
    for _, block in table.groupby(["perception", "scope"]):
        assert list(block.surrogate) == ["exact", "noisy", "constant"]
        assert list(block["rank"].iloc[:2]) == [1, 2]
        assert math.isnan(block.r.iloc[2])
        assert math.isnan(block["rank"].iloc[2])
    exact = table[(table.perception == "a_p") & (table.surrogate == "exact")]
    assert (exact.r == 1).all()
    noisy = table.query("perception == 'a_p' and surrogate == 'noisy' and scope == 'pooled'").iloc[0]
    expected = stats.correlation(frame.noisy, frame.a_p, frame.problem_id)
    assert (noisy.r, noisy.low, noisy.high) == (expected.estimate, expected.low, expected.high)


def along(rates: dict[int, tuple[float, float]], arm: str, problems: int = 400) -> pd.DataFrame:
    """Responses of checkpoints of one arm, with rates (perception, reasoning) by step."""
    rows = [responses({arm: rate}, problems, stream=step).assign(step=step) for step, rate in rates.items()]
    return pd.concat(rows, ignore_index=True)


def test_across_checkpoints_the_outcome_follows_what_varies():
    """Five checkpoints that differ in perception alone: the outcome rises with it, whatever reasoning does."""
    rows = along({step: (0.2 + 0.15 * step, 0.8) for step in range(5)}, "ngdiff")
    table = coupling.checkpoint_coupling(rows).set_index("pair")
    assert set(table.of) == {"all arms"}
    assert table.low["outcome~perception"] > 0.95
    assert table.high["outcome~reasoning"] - table.low["outcome~reasoning"] > 0.5
    assert set(table.checkpoints) == {5}
    assert set(table.n) == {400}
    means = rows.query("mode == 'end_to_end'").groupby("step")[["a", "a_p"]].mean()
    assert table.r["outcome~perception"] == pytest.approx(means.a.corr(means.a_p), abs=1e-5)
    assert table.p["outcome~perception"] == pytest.approx(means.a_p.mean(), abs=1e-5)
    assert table.null["outcome~perception"] > 0.95
    assert coupling.checkpoint_coupling(rows[rows.step < 4]).r.isna().all()


def test_across_checkpoints_the_null_is_the_product_and_token_averaging_stands_apart():
    """Along λ one half is traded for the other; along training both rise."""
    traded = pd.concat([along({0: (x, 1 - x)}, f"lambda_{x:g}") for x in (0.2, 0.4, 0.5, 0.6, 0.8, 0.9)])
    risen = along({step: (0.1 * step, 0.15 * step) for step in range(1, 6)}, "token_averaged")
    table = coupling.checkpoint_coupling(pd.concat([traded, risen])).set_index(["of", "pair"])
    assert dict(table.checkpoints.groupby("of").first()) == {"all arms": 11, "token_averaged": 5}
    means = {name: 100 * stats.select(risen, name).groupby("step").value.mean() for name in ("a_p", "a_r")}
    product = means["a_p"] * means["a_r"]
    for pair, half in (("outcome~perception", "a_p"), ("outcome~reasoning", "a_r")):
        assert table.null["token_averaged", pair] == pytest.approx(product.corr(means[half]), abs=1e-5)
        assert table.null["token_averaged", pair] > table.null["all arms", pair]


OVER = ("start", "outcome", "alpha_0.5")


def finals(rates: dict[str, tuple[float, float, float]]) -> pd.DataFrame:
    """Rollouts by arm: rates of perception, of outcome, and of a surrogate that wrong perceptions earn as well."""
    rng, rows = np.random.default_rng(0), []
    for arm, (sees, solves, earns) in rates.items():
        for problem in range(100):
            a_p, a, surrogate = (rng.random((3, 8)) < np.array([[sees], [solves], [earns]])).astype(float)
            about = {"task": "sudoku", "family": "x", "arm": arm, "seed": 0, "mode": "end_to_end"}
            about |= {"problem_id": f"test-{problem}", "ground_truth": "", "a_p_graded": 0.5 + a_p / 2}
            rows.append(pd.DataFrame(about | {"a": a, "a_p": a_p, "validity": surrogate}))
    return pd.concat(rows, ignore_index=True)


def test_a_surrogate_that_rises_because_perception_does_gains_nothing_where_it_is_wrong():
    rollouts = finals({arm: (sees, 0.4, 0.0) for arm, sees in (("start", 0.3), ("outcome", 0.3), ("validity", 0.7))})
    lucky = (np.random.default_rng(1).random(len(rollouts)) < 0.2).astype(float)
    honest = rollouts.assign(validity=rollouts.a_p.where(rollouts.a_p == 1, lucky))
    table = coupling.hacking(honest, ["validity"], OVER, 200).set_index(["over", "gain"])
    for over in ("start", "outcome"):
        assert table.low[over, "surrogate"] > 20
        assert table.low[over, "wrong"] < 0 < table.high[over, "wrong"]


def test_a_surrogate_is_gamed_if_it_gains_and_perception_does_not():
    rollouts = finals({"start": (0.4, 0.3, 0.3), "outcome": (0.4, 0.4, 0.3), "validity": (0.4, 0.4, 0.6)})
    table = coupling.hacking(rollouts, ["validity", "group_agreement"], OVER, 200).set_index(["over", "gain"])
    means = rollouts.groupby("arm")[["validity", "a_p", "a"]].mean()
    for over in ("start", "outcome"):
        gained = 100 * (means.loc["validity"] - means.loc[over])
        assert table.estimate[over, "surrogate"] == pytest.approx(gained.validity, abs=1e-4)
        assert table.estimate[over, "a"] == pytest.approx(gained.a, abs=1e-4)
        assert table.low[over, "surrogate"] > 20
        assert table.low[over, "a_p"] < 0 < table.high[over, "a_p"]
        assert table.low[over, "fooled"] > 0
        assert table.low[over, "wrong"] > 20
    assert set(table.n[~(table.index.get_level_values("gain") == "wrong")]) == {100}
    assert set(table.arm) == {"validity"}  # the other one was not trained


def test_a_gain_on_wrong_compares_the_same_problems_however_often_an_arm_misreads_them():
    """On either problem both arms earn the same for a misreading; one misreads the dear problem more often."""
    rows = []
    for arm, often in (("outcome", 1), ("validity", 3)):
        for problem, earned, misread in (("cheap", 0.2, 4 - often), ("dear", 0.8, often)):
            about = {"task": "sudoku", "family": "x", "arm": arm, "seed": 0, "problem_id": problem, "ground_truth": ""}
            for k in range(4):
                seen = float(k >= misread)
                rows.append(about | {"a": 0.0, "a_p": seen, "a_p_graded": max(seen, 0.5), "validity": earned})
    table = coupling.hacking(pd.DataFrame(rows), ["validity"], OVER, 50).set_index(["over", "gain"])
    assert table.estimate["outcome", "wrong"] == 0


def test_gaming_is_held_against_an_arm_paid_the_truth_and_unread_perceptions_do_not_count():
    rates = {"start": (0.3, 0.3, 0.2), "outcome": (0.3, 0.3, 0.2), "alpha_0.5": (0.6, 0.4, 0.4)}
    rollouts = finals(rates | {"validity": (0.6, 0.4, 0.4)})  # what it earns where it sees wrong, the truth earns, too
    unread = rollouts[rollouts.arm == "validity"].assign(a_p=0.0, a_p_graded=0.0, validity=0.0)
    rollouts = pd.concat([rollouts, unread], ignore_index=True)
    other_seed = rollouts[rollouts.arm != "validity"].assign(seed=1)  # where the arm was not run
    table = coupling.hacking(pd.concat([rollouts, other_seed]), ["validity"], OVER, 200).set_index(["over", "gain"])
    assert table.low["outcome", "wrong"] > 10
    assert table.low["alpha_0.5", "wrong"] < 0 < table.high["alpha_0.5", "wrong"]
    assert set(table.seeds) == {1}
    assert not table.estimate.isna().any()
