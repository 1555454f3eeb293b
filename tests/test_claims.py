import math

import numpy as np
import pandas as pd
import pytest
from synthetic import responses, split

from asym import claims as module
from asym.claims import COLUMNS, claims, read_claims, record, verdict

BASE = {"base": (0.3, 0.1)}
START = {"start": (0.5, 0.5)}


def verdicts(**tables) -> dict[str, str]:
    return claims(**tables).set_index("claim").verdict.to_dict()


def imbalance(token_share, loss_share, arm="token_averaged"):
    noise = np.random.default_rng(0).normal(0, 0.002, 16)
    shares = {"token_share": token_share + noise, "loss_share": loss_share - noise}
    keys = {"task": "sudoku", "family": "qwen3_vl", "seed": 0, "arm": arm, "step": 0}
    return pd.DataFrame(shares).assign(**keys, batch=range(16))


def screening(r: dict[str, float]) -> pd.DataFrame:
    keys = {"task": "sudoku", "family": "qwen3_vl", "perception": "a_p", "scope": "pooled"}
    return pd.DataFrame({"surrogate": list(r), "r": list(r.values())}).assign(**keys)


@pytest.mark.parametrize(
    ("low", "high", "threshold", "expected"),
    [
        (0.1, 2, 0, "reproduced"),
        (-2, -0.1, 0, "not reproduced"),
        (-1, 1, 0, "inconclusive"),
        (0, 1, 0, "inconclusive"),
        (-1, 1, -2, "reproduced"),
        (-5, -3, -2, "not reproduced"),
        (math.nan, math.nan, 0, "inconclusive"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, threshold, expected):
    assert verdict(low, high, threshold) == expected


@pytest.mark.parametrize(
    ("rates", "expected"), [((0.4, 0.9), "reproduced"), ((0.9, 0.2), "not reproduced"), ((0.6, 0.4), "inconclusive")]
)
def test_c1_and_c6_compare_the_gains_of_the_two_halves(rates, expected):
    assert verdicts(sft_rows=responses(BASE | {"token_averaged": rates}))["C1"] == expected
    rl_rows = responses({"start": BASE["base"], "outcome": rates})
    assert verdicts(rl_rows=rl_rows)["C6"] == expected


def test_c6_tells_reasoning_that_rises_from_perception_that_falls():
    found = verdicts(rl_rows=responses({"start": (0.6, 0.8), "outcome": (0.2, 0.8)}))
    assert (found["C6"], found["C6 a_r rises"]) == ("reproduced", "inconclusive")
    found = verdicts(rl_rows=responses({"start": (0.5, 0.3), "outcome": (0.5, 0.8)}))
    assert (found["C6"], found["C6 a_r rises"]) == ("reproduced", "reproduced")


@pytest.mark.parametrize(
    ("rates", "expected"), [((0.4, 0.9), "reproduced"), ((0.9, 0.4), "not reproduced"), ((0.6, 0.6), "inconclusive")]
)
def test_the_gap_that_is_left_needs_no_base(rates, expected):
    assert verdicts(sft_rows=responses({"token_averaged": rates}))["C1 gap is left"] == expected


@pytest.mark.parametrize(
    ("long", "expected"), [((0.3, 0.9), "reproduced"), ((0.9, 0.5), "not reproduced"), ((0.8, 0.9), "inconclusive")]
)
def test_x1_compares_the_gap_at_the_longest_and_the_shortest_reasoning(long, expected):
    doses = {0.0: (0.8, 0.9), 1.0: (0.1, 0.1), 4.0: long}
    rows = [responses({"token_averaged": rates}).assign(axis="length", level=k) for k, rates in doses.items()]
    rows += [part.assign(axis="entropy", a=0.0) for part in rows]
    assert verdicts(dose_rows=pd.concat(rows))["X1"] == expected
    assert verdicts(dose_rows=rows[0])["X1"] == "inconclusive"


@pytest.mark.parametrize(("seen", "expected"), [(0.3, "reproduced"), (0.9, "not reproduced")])
def test_x1_tells_a_lag_of_perception_from_reasoning_that_is_not_learned(seen, expected):
    """With the longest reasoning neither arm reasons, and so no gap is left; does token averaging see less?"""
    doses = {("token_averaged", 0.0): (0.5, 0.9), ("ngdiff", 0.0): (0.7, 0.9)}
    doses |= {("token_averaged", 4.0): (seen, 0.05), ("ngdiff", 4.0): (0.7, 0.05)}
    rows = [responses({arm: rates}).assign(axis="length", level=level) for (arm, level), rates in doses.items()]
    found = verdicts(dose_rows=pd.concat(rows))
    assert found["X1"] == "not reproduced"
    assert found["X1 perception lags"] == found["X1 perception falls"] == expected


@pytest.mark.parametrize(("second", "expected"), [((0.4, 0.9), "reproduced"), ((0.9, 0.9), "not reproduced")])
def test_x3_compares_ngdiff_with_perception_first(second, expected):
    assert verdicts(sft_rows=responses({"ngdiff": (0.7, 0.9), "perception_first": second}))["X3"] == expected


def test_c2_compares_shares():
    found = claims(imbalance=imbalance(0.10, 0.03)).set_index("claim")
    assert found.estimate["C2"] == pytest.approx(7, abs=0.3)
    assert found.estimate["C2 far below half"] == pytest.approx(40, abs=0.3)
    assert list(found.verdict) == ["reproduced", "reproduced"]
    assert list(verdicts(imbalance=imbalance(0.4, 0.5)).values()) == ["not reproduced", "not reproduced"]
    assert set(verdicts(imbalance=imbalance(0.1, 0.03, arm="ngdiff")).values()) == {"inconclusive"}


@pytest.mark.parametrize(
    ("averaged", "ngdiff", "expected"),
    [
        (0.3, 0.9, ("reproduced", "reproduced", "reproduced")),
        (0.95, 0.4, ("not reproduced", "not reproduced", "not reproduced")),
        (0.7, 0.7, ("inconclusive", "inconclusive", "inconclusive")),
    ],
)
def test_c3_and_c4_compare_accuracy_end_to_end(averaged, ngdiff, expected):
    rows = responses(BASE | {"token_averaged": (averaged, 0.9), "lambda_0.5": (0.7, 0.9), "ngdiff": (ngdiff, 0.9)})
    found = verdicts(sft_rows=rows)
    assert (found["C3"], found["C4"], found["C4 not worse"]) == expected


def test_the_best_arm_is_chosen_out_of_fold():
    """Of ten equal arms the luckiest looks better than an equal baseline; chosen out of fold it does not."""
    lambdas = [f"lambda_0.{i}" for i in range(10)]
    lucky, honest = [], []
    for stream in range(50):
        rows = responses(dict.fromkeys([*lambdas, "token_averaged"], (0.5, 1.0)), problems=100, stream=stream)
        accuracy = 100 * split(rows)[0].groupby("arm").a.mean()
        lucky.append(accuracy[lambdas].max() - accuracy["token_averaged"])
        honest.append(module.best_against(rows, lambdas, ["token_averaged"], 10).estimate)
    assert np.mean(lucky) > 6
    assert abs(np.mean(honest)) < 3


def test_to_beat_the_best_is_to_beat_each():
    """An arm as good as five equal others is not above them, though it is above what is chosen of them out of fold."""
    others = [f"alpha_0.{k}" for k in range(1, 6)]
    chosen, each = [], []
    for stream in range(30):
        rows = responses(dict.fromkeys([*others, "span_routed"], (0.5, 1.0)), problems=100, stream=stream)
        accuracy = 100 * split(rows)[0].groupby("arm").a.mean()
        chosen.append(accuracy["span_routed"] - accuracy[others].max())
        each.append(module.best_against(rows, ["span_routed"], others, 200))
    assert np.mean([found.estimate for found in each]) == pytest.approx(np.mean(chosen), abs=0.5)
    assert np.mean(chosen) < -2
    assert np.mean([found.low > 0 for found in each]) <= 0.05
    strong = responses(dict.fromkeys(others, (0.5, 1.0)) | {"span_routed": (0.8, 1.0)})
    assert module.best_against(strong, ["span_routed"], others, 200).low > 0
    assert module.best_against(strong, ["span_routed"], [], 200).n == 0


def test_the_best_of_one_arm_is_that_arm():
    rows = responses({"x": (0.5, 0.5), "y": (0.5, 0.5)}, problems=20)
    only = module.best_of(rows, ["x"], "best").sort_index()
    pd.testing.assert_frame_equal(only, rows[rows.arm == "x"].assign(arm="best"))
    assert module.best_of(rows, [], "best").empty


def test_an_arm_without_all_seeds_is_no_candidate_for_the_best():
    rows = responses({"x": (0.5, 0.5), "y": (0.5, 0.5), "z": (0.9, 0.9)}, problems=20)
    rows = pd.concat([rows, rows[rows.arm != "z"].assign(seed=1)], ignore_index=True)
    best = module.best_of(rows, ["x", "y", "z"], "best")
    assert set(best.seed) == {0, 1}
    assert len(best) == len(rows[rows.arm == "x"])


def test_c5_looks_for_an_interior_peak_and_the_trade_off():
    peak = {"token_averaged": (0.3, 0.95), "lambda_0.1": (0.9, 0.9), "lambda_0.9": (0.95, 0.3)}
    found = verdicts(sft_rows=responses(peak))
    assert {found["C5 interior"], found["C5 a_p rises"], found["C5 a_r falls"]} == {"reproduced"}
    rising = {"token_averaged": (0.9, 0.2), "lambda_0.5": (0.5, 0.5), "lambda_0.9": (0.3, 1.0)}
    found = verdicts(sft_rows=responses(rising, problems=400))
    assert found["C5 a_p rises"] == found["C5 a_r falls"] == "not reproduced"
    edge = {"token_averaged": (0.95, 0.95), "lambda_0.1": (0.7, 0.7), "lambda_0.9": (0.5, 0.5)}
    assert verdicts(sft_rows=responses(edge))["C5 interior"] == "not reproduced"


@pytest.mark.parametrize(("p", "q", "expected"), [(0.8, 0.4, "reproduced"), (0.4, 0.8, "not reproduced")])
def test_c7_follows_the_base_rates_and_finds_nothing_beyond_them(p, q, expected):
    rollouts, counterfactual = split(responses({"start": (p, q), "base": (q, p)}, rollouts=4))
    found = claims(rollouts=rollouts, counterfactual=counterfactual).set_index("claim")
    assert found.verdict["C7"] == expected
    assert abs(found.estimate["C7 beyond the null"]) < 0.03
    assert abs(found.estimate["C7 beyond forgiveness"]) < 0.03
    assert found.paper["C7"] == "0.65–1.00 vs 0.34–0.43"


def test_c7_beyond_the_null_sees_coupling_that_base_rates_do_not_explain():
    """Answers that come out right although the image was misread loosen the outcome from perception."""
    rollouts, counterfactual = split(responses({"start": (0.5, 0.5)}, rollouts=4))
    lucky = (rollouts.a_p.to_numpy() == 0) & (counterfactual.a.to_numpy() == 1) & (rollouts["rollout"] < 3)
    found = verdicts(rollouts=rollouts.assign(a=rollouts.a.mask(lucky, 1.0)), counterfactual=counterfactual)
    assert found["C7 beyond the null"] == "reproduced"


def test_c8_and_c9_compare_with_outcome_only():
    arms = {"outcome": (0.5, 0.9), "alpha_0.5": (0.95, 0.9), "alpha_1": (0.9, 0.5), "validity": (0.95, 0.9)}
    found = verdicts(rl_rows=responses(START | arms))
    assert [found[claim] for claim in ("C8", "C8 interior", "C9")] == ["reproduced"] * 3
    assert found["C8 graded"] == "inconclusive"
    assert verdicts(rl_rows=responses(START | arms | {"graded_1": (0.95, 0.9)}))["C8 graded"] == "reproduced"
    arms = {"outcome": (0.95, 0.9), "alpha_0.5": (0.5, 0.9), "alpha_1": (0.5, 0.5), "validity": (0.5, 0.9)}
    found = verdicts(rl_rows=responses(START | arms))
    assert [found[claim] for claim in ("C8", "C8 interior", "C9")] == ["not reproduced"] * 3


@pytest.mark.parametrize(("rates", "expected"), [((0.95, 0.9), "reproduced"), ((0.3, 0.9), "not reproduced")])
def test_x2_compares_routed_credit_with_the_best_mixture(rates, expected):
    mixed = START | {"outcome": (0.5, 0.9), "alpha_0.5": (0.6, 0.9), "alpha_1": (0.4, 0.5)}
    assert verdicts(rl_rows=responses(mixed | {"span_routed": rates}))["X2"] == expected
    assert verdicts(rl_rows=responses(mixed | {"span_routed": rates}))["X2 routed"] == expected
    assert verdicts(rl_rows=responses(mixed | {"reweighted_0.5": rates}))["X2 re-weighted"] == expected
    assert set(claims(rl_rows=responses(mixed)).set_index("claim").n[["X2", "X2 routed", "X2 re-weighted"]]) == {0}


def test_the_negative_control_is_no_candidate_for_c9():
    rows = responses(START | {"outcome": (0.5, 0.5), "answer_consistency": (1.0, 1.0)})
    assert claims(rl_rows=rows).set_index("claim").n["C9"] == 0


@pytest.mark.parametrize(("order", "expected"), [(1, "reproduced"), (-1, "not reproduced")])
def test_c10_ranks_surrogates(order, expected):
    names = [*module.CANDIDATES, "answer_consistency"]
    rates = dict(zip(names, [(0.1 + 0.15 * k, 1.0) for k in range(6)], strict=True))
    rows = responses({"outcome": (0.3, 1.0)} | rates)
    scores = screening(dict(zip(names, np.linspace(0.1, 0.9, 6)[::order], strict=True)))
    found = claims(rl_rows=rows, screening=scores).set_index("claim").loc["C10"]
    assert (found.estimate, found.n, found.verdict) == (pytest.approx(order), 6, expected)
    three = claims(rl_rows=rows, screening=scores.iloc[:3]).set_index("claim").loc["C10"]
    assert (three.estimate, three.n, three.verdict) == (pytest.approx(order), 3, "inconclusive")
    one = claims(rl_rows=rows, screening=scores.iloc[:1]).set_index("claim").loc["C10"]
    assert (one.n, one.verdict) == (0, "inconclusive")
    both = pd.concat([scores, scores.assign(scope="within_group", r=-scores.r)])
    found = claims(rl_rows=rows, screening=both).set_index("claim").estimate
    assert found["C10"] == pytest.approx(-found["C10 within groups"]) == pytest.approx(order)


def test_c10_takes_more_than_a_lucky_order():
    """One swap of neighbours among six is still settled; two far out of place are not."""
    names = [*module.CANDIDATES, "answer_consistency"]
    rows = responses({"outcome": (0.3, 1.0)} | {name: (0.1 + 0.15 * k, 1.0) for k, name in enumerate(names)})
    for ranks, expected in (([1, 2, 3, 4, 6, 5], "reproduced"), ([3, 2, 1, 5, 4, 6], "inconclusive")):
        scores = screening({name: rank / 10 for name, rank in zip(names, ranks, strict=True)})
        assert verdicts(rl_rows=rows, screening=scores)["C10"] == expected


def test_the_best_arm_is_chosen_at_other_seeds():
    """Each of five equal arms has one seed at which it is much better: luck of that training, and not credited."""
    arms = [f"lambda_0.{k}" for k in range(5)]
    rows = []
    for seed in range(5):
        rates = {arm: (0.9 if k == seed else 0.5, 1.0) for k, arm in enumerate(arms)} | {"token_averaged": (0.5, 1.0)}
        rows.append(responses(rates, problems=100, stream=seed).assign(seed=seed))
    rows = pd.concat(rows)
    assert module.best_against(rows, arms, ["token_averaged"], 10).estimate < 5
    assert module.best_against(rows[rows.seed == 0], arms, ["token_averaged"], 10).estimate > 20


def test_only_claims_whose_tables_are_given_are_made_and_arms_not_run_are_inconclusive():
    assert list(claims().columns) == COLUMNS
    assert claims().empty
    smoke = responses(BASE | {"token_averaged": (0.4, 0.9)})
    table = claims(sft_rows=pd.concat([smoke, smoke.assign(task="graph_coloring")]))
    assert list(table.columns) == COLUMNS
    assert list(table.claim.unique()) == [
        "C1",
        "C1 gap is left",
        "C3",
        "C4",
        "C4 not worse",
        "C5 a_p rises",
        "C5 a_r falls",
        "C5 interior",
        "X3",
    ]
    assert list(table.task.iloc[:2]) == ["graph_coloring", "sudoku"]
    missing = table[~table.claim.str.startswith("C1")]
    assert (missing.n == 0).all()
    assert missing.estimate.isna().all()
    assert (missing.verdict == "inconclusive").all()


def test_one_problem_is_inconclusive_and_no_error():
    arms = dict.fromkeys(["base", "token_averaged", "lambda_0.3", "lambda_0.5", "lambda_0.7", "ngdiff"], (0.5, 0.5))
    assert set(claims(sft_rows=responses(arms, problems=1)).verdict) == {"inconclusive"}


def test_each_of_several_seeds_is_shown_alone():
    """C1 of two seeds, of which one gains in reasoning and one in perception."""
    one, other = (responses(BASE | {"token_averaged": rates}) for rates in ((0.4, 0.9), (0.9, 0.2)))
    found = claims(sft_rows=pd.concat([one, other.assign(seed=1)])).set_index("claim").loc["C1"]
    alone = [claims(sft_rows=rows).set_index("claim").loc["C1"] for rows in (one, other)]
    assert found.by_seed == ", ".join(f"{claim.estimate:.1f}" for claim in alone)
    assert float(found.by_seed.split(", ")[0]) > 0 > float(found.by_seed.split(", ")[1])
    assert [claim.by_seed for claim in alone] == ["", ""]


def test_recording_replaces_lines_keeps_others_and_survives_a_file(tmp_path):
    path = tmp_path / "tables" / "claims.csv"
    first = record(path, claims(sft_rows=responses(BASE | {"token_averaged": (0.9, 0.2)})))
    rl = claims(rl_rows=responses(START | {"outcome": (0.5, 0.9)}))
    both = record(path, rl)
    assert list(both.claim) == [*first.claim[:-1], *rl.claim, "X3"]  # X2 is the last of the RL claims
    again = claims(sft_rows=responses(BASE | {"token_averaged": (0.4, 0.9)}))
    merged = record(path, again)
    assert merged.set_index("claim").verdict["C1"] == "reproduced"
    assert len(merged) == len(both)
    pd.testing.assert_frame_equal(record(path, again), merged)
    pd.testing.assert_frame_equal(read_claims(path), merged)


def test_arms_that_never_differ_settle_nothing():
    """Both at the floor: "not worse" would hold of any two models."""
    assert verdict(0.0, 0.0, -2.0) == "inconclusive"
    assert verdict(-1.0, 1.0, -2.0) == "reproduced"
