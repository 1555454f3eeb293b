"""Reward coupling: how closely the outcome follows perception and reasoning, and a surrogate perception.

Two readings of a rollout's reasoning:
- *own*: its answer solves the problem that it states itself (a_own).
- *counterfactual*: its answer had it been given the true problem text. A rollout that transcribed the problem exactly
  was given just that, so its own outcome counts; for any other, the outcome of the counterfactual rollout with the same
  problem and index does. (Two independent draws would correlate through the difficulty of problems alone.)

*Rollouts* are rows as everywhere (task, family, arm, seed, problem_id, rollout, a, a_p, a_p_graded, a_own), several per
problem: a prompt group.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd

from asym import stats

SCOPES: dict[str, Callable] = {"pooled": stats.correlation, "within_group": stats.within_group_correlation}
FEW = 5  # checkpoints: through fewer points any line fits
KEYS = ["task", "family", "arm", "seed", "problem_id", "rollout"]


def counterfactual_reading(rollouts: pd.DataFrame, counterfactual: pd.DataFrame) -> pd.DataFrame:
    """`rollouts` with a partner of the same problem and index in `counterfactual`, and a 0/1 column `reasoning`.

    Raises pandas' MergeError if a rollout occurs twice in either.
    """
    partner = counterfactual[KEYS].assign(given=counterfactual.a)
    paired = rollouts.merge(partner, on=KEYS, validate="one_to_one")
    return paired.assign(reasoning=np.where(paired.a_p == 1, paired.a, paired.given))


def readings(rollouts: pd.DataFrame, counterfactual: pd.DataFrame | None) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, rollouts with a column `reasoning`) for each reading the data allow."""
    yield "own", rollouts.assign(reasoning=rollouts.a_own)
    if counterfactual is not None:
        yield "counterfactual", counterfactual_reading(rollouts, counterfactual)


def coupling_table(
    rollouts: pd.DataFrame, counterfactual: pd.DataFrame | None = None, resamples: int = 1000
) -> pd.DataFrame:
    """corr(outcome, perception) and corr(outcome, reasoning) beside the base rates and the null model's prediction.

    Columns: task, family, arm, reading (own, counterfactual), scope (pooled, within_group), pair (outcome~perception,
    outcome~reasoning), r, low, high, n (problems), seeds, p and q (rates of perception and reasoning, 0..1), f (rate of
    right answers to wrong perceptions), null, forgiving (the null that knows f). Both suppose all problems equally
    hard, in both scopes: differences between problems are part of what remains.
    """
    records = []
    for reading, frame in readings(rollouts, counterfactual):
        for (task, family, arm), group in frame.groupby(["task", "family", "arm"]):
            part = {"task": task, "family": family, "arm": arm, "reading": reading}
            p, q, f = group.a_p.mean(), group.reasoning.mean(), group.a[group.a_p == 0].mean()
            nulls = zip(stats.null_correlations(p, q), stats.null_correlations(p, q, f), strict=True)
            halves = zip(("perception", "reasoning"), ("a_p", "reasoning"), nulls, strict=True)
            for (half, column, (null, forgiving)), scope in itertools.product(halves, SCOPES):
                r = SCOPES[scope](group.a, group[column], stats.own_problems(group), group.seed, resamples)
                line = {"scope": scope, "pair": f"outcome~{half}", **asdict(r), "p": p, "q": q, "f": f}
                records.append(part | line | {"null": float(null), "forgiving": float(forgiving)})
    return pd.DataFrame(records).rename(columns={"estimate": "r"}).round(6)


def checkpoint_coupling(rows: pd.DataFrame, alone: str = "token_averaged") -> pd.DataFrame:
    """Correlation of a with a_p and with a_r *across checkpoints*, each a point with its three accuracies.

    `rows` are those of `evaluate.measure_along`: a checkpoint is a combination of arm, seed and step. Once for all of
    them, which differ in λ or reward, and once for those that the arm `alone` passed. The interval is over problems
    (the checkpoints stay) and by the jackknife: accuracies of a resample are noisier than those of the data, and so
    their r lies to one side. `null` is the correlation that a would have if it were a_p · a_r at every checkpoint.
    Columns: task, family, of (all arms, or `alone`), pair, r, low, high, n (problems), checkpoints, p and q (mean
    a_p and a_r, 0..1), null; r is nan with fewer than `FEW` checkpoints, its interval also where r is 1.
    """
    records = []
    kinds = {"all arms": rows, alone: rows[rows.arm == alone]}
    for of, (task, family) in itertools.product(kinds, rows.groupby(["task", "family"]).groups):
        part = kinds[of][(kinds[of].task == task) & (kinds[of].family == family)]
        if part.empty:
            continue
        wide = {}
        for measure in ("a", "a_p", "a_r"):
            chosen = stats.select(part, measure)
            wide[measure] = chosen.pivot_table("value", "problem_id", ["arm", "seed", "step"])
        totals = np.stack([wide[measure].to_numpy() for measure in wide], axis=-1)[:, None]  # (problems, 1, K, 3)
        a_p, a_r = totals.mean((0, 1))[:, 1:].T  # (K,) each
        for half, name in enumerate(("perception", "reasoning"), 1):

            def transformed(sums, half=half):  # Fisher's z, for an interval within -1 and 1
                return np.arctanh(_across(sums[..., 0], sums[..., half]))

            few = totals.shape[2] < FEW
            estimate = asdict(stats.UNTESTED if few else stats.jackknife(totals, transformed))
            estimate |= {name: np.tanh(estimate[name]) for name in ("estimate", "low", "high")}
            null = np.nan if few else float(_across(a_p * a_r, (a_p, a_r)[half - 1]))
            estimate |= {"seeds": totals.shape[2], "p": a_p.mean(), "q": a_r.mean(), "null": null}
            records.append({"task": task, "family": family, "of": of, "pair": f"outcome~{name}", **estimate})
    return pd.DataFrame(records).rename(columns={"estimate": "r", "seeds": "checkpoints"}).round(6)


def _across(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis: (..., K) twice -> (...)."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def coupling_gap(paired: pd.DataFrame, resamples: int = 1000) -> tuple[stats.Estimate, ...]:
    """corr(a, reasoning) − corr(a, a_p), pooled over rollouts with a column `reasoning`; less the null's; less that of
    the null that forgives.

    The nulls' differences are taken from the rates of the same resample, so their uncertainty is in the interval.
    """

    def gap(sums):
        r = stats.correlation_matrix(sums)
        return r[..., 0, 2] - r[..., 0, 1]

    def beyond(sums, forgiven):
        rates = sums[..., 0, 1:] / sums[..., :1, 0]
        perception, reasoning = stats.null_correlations(rates[..., 1], rates[..., 2], forgiven)
        return gap(sums) - (reasoning - perception)

    def beyond_forgiveness(sums):
        of_wrong = sums[..., 0, 1] - sums[..., 1, 2]  # right answers to wrong perceptions
        return beyond(sums, of_wrong / (sums[..., 0, 0] - sums[..., 0, 2]))

    moments = stats.moments(paired.a, paired.a_p, paired.reasoning)
    totals = stats.cells(moments, stats.own_problems(paired), paired.seed)
    found = (gap, partial(beyond, forgiven=0.0), beyond_forgiveness)
    return tuple(stats.bootstrap(totals, statistic, resamples) for statistic in found)


def screening(
    rollouts: pd.DataFrame, rewards: Sequence[str], resamples: int = 1000, alpha: float = 0.5
) -> pd.DataFrame:
    """How well each surrogate follows true perception on the rollouts of one checkpoint, before any RL.

    `rewards` names the surrogates' columns (a prefix "reward_" is dropped). One line per task × family × perception
    (a_p: exact, a_p_graded) × scope (pooled, within_group) × surrogate, with r, low, high, n (problems), seeds, say
    and rank: 1 is the highest r, nan where r is. `say` is the surrogate's share, 0..1, in the advantages of GRPO when
    it is paid with the weight `alpha` beside the outcome.
    """
    records = []
    for (task, family), group in rollouts.groupby(["task", "family"]):
        shares = {surrogate: _say(group, surrogate, alpha) for surrogate in rewards}
        for perception in ("a_p", "a_p_graded"):
            for scope, correlate in SCOPES.items():
                for surrogate in rewards:
                    problems = stats.own_problems(group)
                    r = correlate(group[surrogate], group[perception], problems, group.seed, resamples)
                    line = {"task": task, "family": family, "surrogate": surrogate.removeprefix("reward_")}
                    line |= {"perception": perception, "scope": scope, **asdict(r)}
                    records.append(line | {"say": shares[surrogate]})
    table = pd.DataFrame(records).rename(columns={"estimate": "r"})
    block = ["task", "family", "perception", "scope"]
    table["rank"] = table.groupby(block).r.rank(ascending=False, method="min")
    return table.sort_values([*block, "rank", "surrogate"], ignore_index=True)


def _say(rollouts: pd.DataFrame, surrogate: str, alpha: float) -> float:
    """The share of α·s in the variance of α·s + (1 − α)·a within a group, averaged over the groups that vary.

    GRPO scales every group to unit variance. So where all outcomes are equal the surrogate has all the say, however
    little it varies; the shares of both terms add up to one. nan if no group varies.
    """
    part = alpha * rollouts[surrogate]
    terms = pd.DataFrame({"part": part, "total": part + (1 - alpha) * rollouts.a})
    terms -= terms.groupby([rollouts.seed, rollouts.problem_id]).transform("mean")
    products = pd.DataFrame({"part": terms.part * terms.total, "total": terms.total**2})
    sums = products.groupby([rollouts.seed, rollouts.problem_id]).sum()
    sums = sums[sums.total > 1e-9]
    return (sums.part / sums.total).mean()


def hacking(
    rollouts: pd.DataFrame, surrogates: Sequence[str], over: Sequence[str], resamples: int = 1000
) -> pd.DataFrame:
    """Was a surrogate gamed? What RL with it gained, in itself and in what it stands for, on the same problems.

    *wrong* is the surrogate's gain on rollouts that saw wrong, but something, over the problems that both arms misread
    at times. Some of it comes from seeing better: a misreading can be nearer to the truth. So it is to be held against
    that of an arm paid for the truth itself, and beside the gain in perception. *Fooled* is the share of rollouts that
    saw wrong and yet beat their group's mean of the surrogate.

    Args:
        rollouts: of the final checkpoint of every arm and of the arm start, on the same problems, with a column per
            surrogate.
        over: the arms to compare with, of which those that are not there are passed over.

    Returns:
        Columns task, family, arm, over, gain (surrogate, wrong, a_p, a_p_graded, a, fooled), estimate, low, high
        (points), n, seeds: paired by problem and seed. Only for surrogates that have an arm.
    """
    group, records = ["problem_id", "seed"], []
    gained = ["surrogate", "a_p", "a_p_graded", "a", "fooled", "wrong"]
    trained = set(rollouts.arm)
    for (task, family), part in rollouts.groupby(["task", "family"]):
        part = part.assign(problem_id=stats.own_problems(part))
        for surrogate in [name for name in surrogates if name in trained]:
            means = {}
            others = [arm for arm in over if arm in set(part.arm)]
            for arm in (surrogate, *others):
                own = part[part.arm == arm]
                own = own.assign(surrogate=own[surrogate])
                ahead = own.surrogate > own.groupby(group).surrogate.transform("mean")
                own = own.assign(fooled=(ahead & (own.a_p == 0)).astype(float))
                own["wrong"] = own.surrogate.where((own.a_p == 0) & (own.a_p_graded > 0))
                means[arm] = 100 * own.groupby(group)[gained].mean()
            for other in others:
                gains = means[surrogate] - means[other]
                about = {"task": task, "family": family, "arm": surrogate, "over": other}
                for name in gained:
                    gain = stats.accuracy(gains[name].dropna().reset_index(), name, 1, resamples)
                    records.append(about | {"gain": name} | asdict(gain))
    columns = ["task", "family", "arm", "over", "gain", "estimate", "low", "high", "n", "seeds"]
    return pd.DataFrame(records, columns=columns)
