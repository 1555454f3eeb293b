import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import responses, split

from asym import stats
from asym.stats import Estimate

pytestmark = pytest.mark.filterwarnings("error")


def table(values, problems, seeds=0) -> pd.DataFrame:
    return pd.DataFrame({"value": values, "problem_id": problems, "seed": seeds})


def test_mean_of_problems_and_its_interval_match_the_normal_approximation():
    values = np.random.default_rng(1).random(500) < 0.3
    estimate = stats.accuracy(table(values, range(500)), "value")
    spread = 100 * values.std() / np.sqrt(500)
    assert estimate.estimate == pytest.approx(100 * values.mean())
    assert (estimate.n, estimate.seeds) == (500, 1)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize("seeds", [1, 6])
def test_interval_covers_the_true_mean(seeds):
    """95 % nominal; rollouts share their problem's difficulty, and problems their seed's luck."""
    rng, covered = np.random.default_rng(2), 0
    problems, rollouts, simulations = 60, 4, 300
    ids = np.broadcast_to(np.arange(problems)[:, None, None], (problems, seeds, rollouts)).ravel()
    runs = np.broadcast_to(np.arange(seeds)[None, :, None], (problems, seeds, rollouts)).ravel()
    for _ in range(simulations):
        difficulty = rng.uniform(-0.3, 0.3, (problems, 1, 1))
        luck = rng.uniform(-0.1, 0.1, (1, seeds, 1)) * (seeds > 1)
        values = rng.random((problems, seeds, rollouts)) < 0.5 + difficulty + luck
        estimate = stats.accuracy(table(values.ravel(), ids, runs), "value", resamples=300)
        covered += estimate.low <= 50 <= estimate.high
    assert 0.90 <= covered / simulations <= 0.985


def test_rollouts_of_one_problem_are_not_counted_as_independent():
    values, problems = np.tile([0.0, 1.0], 30), np.tile(np.arange(60), 1)
    once = stats.accuracy(table(values, problems), "value")
    often = stats.accuracy(table(np.repeat(values, 8), np.repeat(problems, 8)), "value")
    assert often == once


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    ids, runs = np.tile(np.arange(200), 3), np.repeat([0, 1, 2], 200)
    values = rng.random(600) < np.array([0.2, 0.5, 0.8])[runs]
    pooled = stats.accuracy(table(values, ids), "value")
    resampled = stats.accuracy(table(values, ids, runs), "value")
    assert resampled.seeds == 3
    assert resampled.high - resampled.low > 2 * (pooled.high - pooled.low)


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
def test_equal_values_give_an_interval_of_no_width(value):
    assert stats.accuracy(table([value] * 30, range(30)), "value") == Estimate(
        100 * value, 100 * value, 100 * value, 30, 1
    )


def test_one_problem_has_no_interval_and_no_problem_no_estimate():
    one = stats.accuracy(table([1.0, 0.0], ["x", "x"]), "value")
    assert (one.estimate, one.n) == (50, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = stats.accuracy(table([], []), "value")
    assert math.isnan(none.estimate)
    assert (none.n, none.seeds) == (0, 0)


def test_measures_has_a_line_per_arm_and_measure_in_points():
    rows = responses({"base": (0.2, 0.1), "ngdiff": (0.9, 0.8)})
    rows.loc[rows.arm == "base", "parse_failure"] = "no answer"
    measures = stats.measures(rows).set_index(["arm", "measure"])
    assert list(measures.columns) == ["task", "family", "estimate", "low", "high", "n", "seeds"]
    assert list(measures.loc["base"].index) == list(stats.MEASURES)
    end_to_end, counterfactual = (part[part.arm == "ngdiff"] for part in split(rows))
    assert measures.estimate["ngdiff", "a"] == pytest.approx(100 * end_to_end.a.mean())
    assert measures.estimate["ngdiff", "a_p_graded"] == pytest.approx(100 * end_to_end.a_p_graded.mean(), abs=1e-6)
    assert measures.estimate["ngdiff", "a_r"] == pytest.approx(100 * counterfactual.a.mean())
    assert measures.estimate["base", "parse_failure"] == 100
    assert measures.estimate["ngdiff", "parse_failure"] == 0
    assert "a_r" not in set(stats.measures(split(rows)[0]).measure)


def test_a_paired_difference_uses_the_pairing():
    """Two arms that differ by a constant per problem: paired, nothing is uncertain."""
    rows = responses({"x": (0.5, 0.5)}).assign(a=lambda r: r.a / 2)
    better = rows.assign(arm="y", a=rows.a + 0.25)
    both = pd.concat([rows, better])
    assert stats.paired_difference(both, "y", "x", "a") == Estimate(25, 25, 25, 200, 1)
    shuffled = both.sample(frac=1, random_state=0)
    assert stats.paired_difference(shuffled, "y", "x", "a") == stats.paired_difference(both, "y", "x", "a")


def test_a_paired_difference_drops_what_has_no_partner():
    x, y = responses({"x": (0.5, 0.5)}, seeds=(0, 1)), responses({"y": (0.5, 0.5)}, problems=150)
    estimate = stats.paired_difference(pd.concat([x, y]), "y", "x", "a")
    assert (estimate.n, estimate.seeds) == (150, 1)
    common = x[(x.seed == 0) & (x.problem_id < "test-0150")]
    mean = {name: 100 * split(part)[0].a.mean() for name, part in (("x", common), ("y", y))}
    assert estimate.estimate == pytest.approx(mean["y"] - mean["x"])
    assert repr(stats.paired_difference(x, "y", "x", "a")) == repr(stats.UNTESTED)


def test_difference_of_gains_is_the_difference_of_the_paired_gains():
    rows = responses({"base": (0.2, 0.1), "token_averaged": (0.4, 0.9)}, seeds=(0, 1, 2))
    gains = stats.gains(rows, "base").set_index("measure").estimate
    difference = stats.difference_of_gains(rows, "token_averaged", "base")
    assert difference.estimate == pytest.approx(gains["a_r"] - gains["a_p"])
    assert difference.low > 0
    assert difference.seeds == 3


def test_a_gain_is_the_sum_of_what_problems_add_by_who_read_them():
    rows = responses({"token_averaged": (0.4, 0.8), "ngdiff": (0.7, 0.8)}, seeds=(0, 1))
    found = stats.gain_by_reading(rows, "ngdiff", "token_averaged", 50).set_index("reading")
    assert found.estimate.sum() == pytest.approx(
        stats.paired_difference(rows, "ngdiff", "token_averaged", "a", 10).estimate, abs=1e-5
    )
    assert found.share.sum() == pytest.approx(100, abs=0.2)  # rounded
    assert found.estimate["newly read"] == pytest.approx(100 * 0.6 * 0.7 * 0.8, abs=5)  # who misreads is never right
    assert found.estimate["no longer read"] == pytest.approx(-100 * 0.4 * 0.3 * 0.8, abs=5)
    assert found.low["newly read"] < found.estimate["newly read"] < found.high["newly read"]
    assert found.estimate["read by neither"] == 0
    assert stats.gain_by_reading(rows, "pcgrad", "token_averaged").empty


def test_correlations_equal_numpys():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(50), 6)
    shared = rng.normal(size=50)[groups]
    x, y = shared + rng.normal(size=300), shared - rng.normal(size=300)
    pooled = stats.correlation(x, y, groups)
    assert pooled.estimate == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert pooled.low < pooled.estimate < pooled.high
    means = [np.array([v[groups == g].mean() for g in groups]) for v in (x, y)]
    within = stats.within_group_correlation(x, y, groups)
    assert within.estimate == pytest.approx(np.corrcoef(x - means[0], y - means[1])[0, 1], abs=1e-6)
    assert pooled.estimate > 0.3
    assert within.low < 0 < within.high  # all of the correlation was between groups


@pytest.mark.parametrize("offset", [0.0, 0.1, 1e3])
def test_constants_correlate_with_nothing(offset):
    x, groups = np.full(40, offset), np.repeat(np.arange(10), 4)
    y = np.random.default_rng(5).random(40)
    assert math.isnan(stats.correlation(x, y, groups).estimate)
    assert math.isnan(stats.within_group_correlation(groups + offset, y, groups).estimate)


def test_a_correlation_that_hangs_on_one_problem_has_no_interval():
    x = np.zeros(40)
    x[7] = 1
    rare = stats.correlation(x, np.random.default_rng(6).random(40), np.arange(40))
    assert not math.isnan(rare.estimate)
    assert math.isnan(rare.low)


rates = st.floats(0.01, 0.99)


@given(rates, rates)
def test_null_correlations_agree_with_the_covariances(p, q):
    perception, reasoning = stats.null_correlations(p, q)
    deviation = math.sqrt(p * q * (1 - p * q))
    assert perception == pytest.approx(p * q * (1 - p) / (deviation * math.sqrt(p * (1 - p))))
    assert reasoning == pytest.approx(p * q * (1 - q) / (deviation * math.sqrt(q * (1 - q))))
    assert stats.null_correlations(q, p) == (reasoning, perception)
    if abs(p - q) > 1e-6:
        assert (reasoning > perception) == (p > q)


def test_the_forgiving_null_agrees_with_simulation_and_forgives_nothing_at_rate_zero():
    rng = np.random.default_rng(7)
    a_p, a_r, lucky = (rng.random(400_000) < rate for rate in (0.4, 0.8, 0.3))
    a = np.where(a_p, a_r, lucky)
    expected = stats.null_correlations(0.4, 0.8, 0.3)
    assert np.corrcoef(a, a_p)[0, 1] == pytest.approx(expected[0], abs=0.01)
    assert np.corrcoef(a, a_r)[0, 1] == pytest.approx(expected[1], abs=0.01)
    assert stats.null_correlations(0.4, 0.8, 0.0) == stats.null_correlations(0.4, 0.8)


def test_null_correlations_agree_with_simulation_and_are_undefined_for_constants():
    rng = np.random.default_rng(7)
    a_p, a_r = rng.random(200_000) < 0.4, rng.random(200_000) < 0.8
    expected = stats.null_correlations(0.4, 0.8)
    assert np.corrcoef(a_p & a_r, a_p)[0, 1] == pytest.approx(expected[0], abs=0.01)
    assert np.corrcoef(a_p & a_r, a_r)[0, 1] == pytest.approx(expected[1], abs=0.01)
    np.testing.assert_allclose(
        stats.null_correlations([1, 0.5, 0], [0.5, 1, 0.5]), [[np.nan, 1, np.nan], [1, np.nan, np.nan]]
    )


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_any_rows_give_an_ordered_interval_that_does_not_depend_on_their_order(rows):
    forward, backward = (
        stats.accuracy(pd.DataFrame(part, columns=["problem_id", "seed", "value"]), "value", resamples=50)
        for part in (rows, rows[::-1])
    )
    assert repr(forward) == repr(backward)
    assert math.isnan(forward.low) or 0 <= forward.low <= forward.high <= 100


def test_curves_are_means_by_step():
    rows = responses({"ngdiff": (0.8, 0.5)}, problems=50, seeds=(0, 1))
    rows = pd.concat([rows.assign(step=1, a=0.0, a_p=0.0), rows.assign(step=2)])
    found = stats.curves(rows).set_index(["seed", "step"])
    assert list(found.loc[0].index) == [1, 2]
    assert (found.loc[(slice(None), 1), ["a", "a_p", "a_r"]] == 0).all(axis=None)
    late = rows[(rows.step == 2) & (rows.seed == 1)]
    end_to_end, counterfactual = split(late)
    expected = [100 * end_to_end.a.mean(), 100 * end_to_end.a_p.mean(), 100 * counterfactual.a.mean()]
    assert found.loc[(1, 2), ["a", "a_p", "a_r"]].tolist() == pytest.approx(expected)


def test_rankings_that_agree_wholly_do_so_in_one_pairing_of_all():
    assert stats.rank_agreement([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx((1, 1 / 24))
    assert stats.rank_agreement([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx((-1, 1))
    assert stats.rank_agreement([1, 2, np.nan, 3, 4], [1, 2, 9, 3, 4]) == pytest.approx((1, 1 / 24))


@pytest.mark.parametrize("y", [[1, 2, 3], [1, 1, 1, 1], [1, 2, 3, np.nan]])
def test_few_or_constant_pairs_have_no_agreement(y):
    assert all(math.isnan(value) for value in stats.rank_agreement(range(len(y)), y))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 200)
    totals = stats.cells(np.stack([values, np.ones(200)], 1), range(200))
    found = stats.jackknife(totals, lambda sums: sums[..., 0] / sums[..., 1])
    assert found.estimate == pytest.approx(values.mean(), abs=1e-5)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 200**0.5, rel=1e-3)
    assert found.n == 200
    endless = stats.jackknife(totals, lambda sums: sums[..., 0] / 0)
    one = stats.jackknife(totals[:1], lambda sums: sums[..., 0] / sums[..., 1])
    assert np.isnan([one.low, endless.low]).all()


def test_the_jackknife_holds_a_cosine_that_resamples_miss():
    """Two sums of long noisy vectors: each resample is noisier than the data, its cosine smaller."""
    rng = np.random.default_rng(0)
    shared = 0.3 * rng.normal(size=400)
    both = np.concatenate([shared + rng.normal(size=(60, 400)), shared + rng.normal(size=(60, 400))], 1)

    def cosine(sums):
        one, other = np.split(sums, 2, axis=-1)
        return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))

    totals = stats.cells(both, range(60))
    drawn, jackknifed = stats.bootstrap(totals, cosine, 500), stats.jackknife(totals, cosine)
    assert drawn.high < drawn.estimate == jackknifed.estimate
    assert jackknifed.low < jackknifed.estimate < jackknifed.high
