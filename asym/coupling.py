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
    outcome~reasoning), r, low, high, n (problems), seeds, p and q (rates of perception and reasoning, 0..1), null. The
    null supposes all problems equally hard, in both scopes: differences between problems are part of what remains.
    """
    records = []
    for reading, frame in readings(rollouts, counterfactual):
        for (task, family, arm), group in frame.groupby(["task", "family", "arm"]):
            part = {"task": task, "family": family, "arm": arm, "reading": reading}
            p, q = group.a_p.mean(), group.reasoning.mean()
            null_p, null_r = stats.null_correlations(p, q)
            halves = (("perception", group.a_p, null_p), ("reasoning", group.reasoning, null_r))
            for scope, correlate in SCOPES.items():
                for half, success, null in halves:
                    r = correlate(group.a, success, group.problem_id, group.seed, resamples)
                    line = {"scope": scope, "pair": f"outcome~{half}", **asdict(r), "p": p, "q": q, "null": float(null)}
                    records.append(part | line)
    return pd.DataFrame(records).rename(columns={"estimate": "r"}).round(6)


def checkpoint_coupling(rows: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """Correlation of a with a_p and with a_r *across checkpoints*, each a point with its three accuracies.

    `rows` are those of `evaluate.measure_along`: a checkpoint is a combination of arm, seed and step. Once for all of
    them, which differ in λ, and once for those that token averaging passed. The interval resamples problems, the
    checkpoints stay. `null` is the correlation that a would have if it were the product a_p · a_r at every checkpoint.
    Columns: task, family, of (all arms, token_averaged), pair, r, low, high, n (problems), checkpoints, p and q (mean
    a_p and a_r, 0..1), null; r is nan with fewer than `FEW` checkpoints.
    """
    records = []
    kinds = {"all arms": rows, "token_averaged": rows[rows.arm == "token_averaged"]}
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

            def correlation(sums, half=half):
                return _across(sums[..., 0], sums[..., half])

            few = totals.shape[2] < FEW
            estimate = asdict(stats.UNTESTED if few else stats.bootstrap(totals, correlation, resamples))
            null = np.nan if few else float(_across(a_p * a_r, (a_p, a_r)[half - 1]))
            estimate |= {"seeds": totals.shape[2], "p": a_p.mean(), "q": a_r.mean(), "null": null}
            records.append({"task": task, "family": family, "of": of, "pair": f"outcome~{name}", **estimate})
    return pd.DataFrame(records).rename(columns={"estimate": "r", "seeds": "checkpoints"}).round(6)


def _across(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis: (..., K) twice -> (...)."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def coupling_gap(paired: pd.DataFrame, resamples: int = 1000) -> tuple[stats.Estimate, stats.Estimate]:
    """corr(a, reasoning) − corr(a, a_p), pooled over rollouts with a column `reasoning`, and the same less the null's.

    The null's difference is taken from the base rates of the same resample, so its uncertainty is in the interval.
    """

    def gap(sums):
        r = stats.correlation_matrix(sums)
        return r[..., 0, 2] - r[..., 0, 1]

    def beyond_null(sums):
        rates = sums[..., 0, 1:] / sums[..., :1, 0]
        perception, reasoning = stats.null_correlations(rates[..., 1], rates[..., 2])
        return gap(sums) - (reasoning - perception)

    totals = stats.cells(stats.moments(paired.a, paired.a_p, paired.reasoning), paired.problem_id, paired.seed)
    return stats.bootstrap(totals, gap, resamples), stats.bootstrap(totals, beyond_null, resamples)


def screening(rollouts: pd.DataFrame, rewards: Sequence[str], resamples: int = 1000) -> pd.DataFrame:
    """How well each surrogate follows true perception on the rollouts of one checkpoint, before any RL.

    `rewards` names the surrogates' columns (a prefix "reward_" is dropped). One line per task × family × perception
    (a_p: exact, a_p_graded) × scope (pooled, within_group) × surrogate, with r, low, high, n (problems), seeds, spread
    and rank: 1 is the highest r, nan where r is. `spread` is the surrogate's standard deviation within groups over that
    of the outcome: GRPO normalises their weighted sum, so at equal weights the one that varies more decides more.
    """
    records = []
    for (task, family), group in rollouts.groupby(["task", "family"]):
        within = group.groupby(["seed", "problem_id"])[["a", *rewards]].std(ddof=0).pow(2).mean().pow(0.5)
        for perception in ("a_p", "a_p_graded"):
            for scope, correlate in SCOPES.items():
                for surrogate in rewards:
                    r = correlate(group[surrogate], group[perception], group.problem_id, group.seed, resamples)
                    line = {"task": task, "family": family, "surrogate": surrogate.removeprefix("reward_")}
                    line |= {"perception": perception, "scope": scope, **asdict(r)}
                    records.append(line | {"spread": within[surrogate] / within.a if within.a else np.nan})
    table = pd.DataFrame(records).rename(columns={"estimate": "r"})
    block = ["task", "family", "perception", "scope"]
    table["rank"] = table.groupby(block).r.rank(ascending=False, method="min")
    return table.sort_values([*block, "rank", "surrogate"], ignore_index=True)


def hacking(rollouts: pd.DataFrame, surrogates: Sequence[str], resamples: int = 1000) -> pd.DataFrame:
    """Was a surrogate gamed? What its arm gains over outcome-only in the second half of GRPO, on the same problems.

    Every arm meets the same problems in the same order, so gains are paired by problem. *Fooled* is the share of
    rollouts that saw wrong and yet beat their group's mean of the surrogate: in outcome-only, nobody aimed at that.

    Args:
        rollouts: of GRPO, with the columns task, family, arm, seed, step, problem_id, a, a_p and one per surrogate.

    Returns:
        Columns task, family, arm, gain (surrogate, a_p, a, fooled), estimate, low, high (points), n, seeds. Of a
        surrogate that outcome-only was not asked for, the gains in it and in fooled are nan, with n = 0.
    """
    late = rollouts[rollouts.step >= (rollouts.step.max() + 1) / 2]
    group, records = ["seed", "step", "problem_id"], []
    for (task, family), part in late.groupby(["task", "family"]):
        for surrogate in surrogates:
            means = {}
            for arm in (surrogate, "outcome"):
                own = part[part.arm == arm]
                own = own.assign(
                    surrogate=own[surrogate], ahead=own[surrogate] > own.groupby(group)[surrogate].transform("mean")
                )
                own = own.assign(fooled=(own.ahead & (own.a_p == 0)).where(own.surrogate.notna()).astype(float))
                means[arm] = 100 * own.groupby(group)[["surrogate", "a_p", "a", "fooled"]].mean()
            gains = (means[surrogate] - means["outcome"]).reset_index()
            for name in ("surrogate", "a_p", "a", "fooled"):
                known = gains.dropna(subset=name)
                estimate = stats.accuracy(known, name, 1, resamples) if len(known) else stats.UNTESTED
                line = {"task": task, "family": family, "arm": surrogate, "gain": name}
                records.append(line | asdict(estimate))
    columns = ["task", "family", "arm", "gain", "estimate", "low", "high", "n", "seeds"]
    return pd.DataFrame(records, columns=columns)
