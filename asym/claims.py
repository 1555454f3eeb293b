"""The claims table: each claim of the paper that the study tests, our estimate of it, and a verdict by rule.

A claim is stated as an estimate that should exceed a threshold, 0 unless said otherwise. **Verdict**: *reproduced* if
the whole 95 % interval lies above the threshold, *not reproduced* if it lies wholly below, else *inconclusive*. A claim
whose arms were not run is inconclusive with n = 0. Accuracies, gains and shares are in points (0..100), correlations
are r. Intervals over few seeds that differ much are too narrow (`stats`), so the column by_seed shows each seed alone.

"The best of several arms" is chosen out of fold: for each fifth of the problems at each seed, the arm with the highest
mean a on the other four fifths, at the other seeds where there are any. Choosing and comparing on the same problems, or
on the same trained weights, would favour the best by its luck. Where the best of several is what must be beaten, each
of them must be (the out-of-fold choice would fall short of the best, and be beaten too easily): the line is that of the
one with the lowest lower end.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from asym import stats
from asym.coupling import counterfactual_reading, coupling_gap
from asym.params import ParamsError
from asym.runs import read_manifest, write_csv
from asym.stats import UNTESTED, Estimate, difference_of_gains, paired_difference

COLUMNS = ["claim", "task", "family", "estimate", "low", "high", "n", "seeds", "by_seed", "paper", "verdict"]
# "yes" where it is not here: stated without a figure
PAPER = {
    "C1 gap is left": "perception is the bottleneck",
    "C2": "1.3 % of the loss < 2.5 % of the tokens",
    "C2 far below half": "2.5 % of the tokens",
    "C3": "up to +13.8",
    "C4": "up to +18.2",
    "C7": "0.65–1.00 vs 0.34–0.43",
    "C7 beyond the null": "not given",
    "C7 beyond forgiveness": "not given",
    "C7 own reading": "0.65–1.00 vs 0.34–0.43",
    "C8": "up to +6.0",
    "C8 graded": "not given",
    "C9": "up to +3.2",
    "C10 within groups": "not given",
    "X1": "not tested",
    "X1 perception falls": "not tested",
    "X1 perception lags": "not tested",
    "X2": "not tested",
    "X2 routed": "not tested",
    "X2 re-weighted": "not tested",
    "X3": "not tested",
}
CANDIDATES = ("self_blindfold", "solver_blindfold", "validity", "group_agreement", "image_dependence")
CONTROL = "answer_consistency"  # a surrogate that rewards reasoning: ranked in C10, but no candidate for C9
FOLDS = 5  # of the problems, to choose the best arm out of
MARGIN = 2.0  # points by which an arm may fall behind and still be "not worse"
QUARTER = 25.0  # points: a share below one half by more than this is "far below"

# Their estimates are r or ρ, the others' points
CORRELATIONS = ("C7", "C7 beyond the null", "C7 beyond forgiveness", "C7 own reading", "C10", "C10 within groups")

Part = tuple[str, Estimate, float]  # claim, estimate, threshold


def verdict(low: float, high: float, threshold: float = 0.0) -> str:
    """The rule above; an interval that is nan, or just 0 because no response differs, is inconclusive."""
    if low == high == 0:
        return "inconclusive"
    if low > threshold:
        return "reproduced"
    return "not reproduced" if high < threshold else "inconclusive"


def best_of(rows: pd.DataFrame, arms: list[str], name: str) -> pd.DataFrame:
    """Rows of an arm `name` that takes each fold at each seed from whichever of `arms` has the best a outside both.

    Arms that lack one of the seeds of the others are no candidates.
    """
    candidates = rows[rows.arm.isin(_whole(rows, arms))]
    fold = pd.factorize(candidates.problem_id, sort=True)[0] % FOLDS
    chosen = [candidates.iloc[:0]]
    for k, seed in itertools.product(np.unique(fold), candidates.seed.unique()):
        own = candidates.seed == seed
        outside = stats.select(candidates[(fold != k) & (~own | own.all())], "a").groupby("arm").value.mean()
        best = outside.idxmax() if len(outside) else arms[0]  # one problem alone leaves nothing to choose by
        chosen.append(candidates[(fold == k) & own & (candidates.arm == best)])
    return pd.concat(chosen).assign(arm=name)


def best_against(rows: pd.DataFrame, arms: list[str], others: list[str], resamples: int) -> Estimate:
    """a of the best of `arms` − a of whichever of `others` is hardest to beat, in points; `UNTESTED` without either."""
    if not arms or not others:
        return UNTESTED
    best = best_of(rows, arms, "best")
    found = [
        paired_difference(pd.concat([best, rows[rows.arm == other]]), "best", other, "a", resamples) for other in others
    ]
    return min(found, key=lambda over: over.estimate if np.isnan(over.low) else over.low)


def mixtures(rows: pd.DataFrame, prefix: str) -> list[str]:
    """The arms `<prefix><weight>` in ascending order of weight, without those that lack a seed of the others."""
    arms = _whole(rows, [arm for arm in rows.arm.unique() if arm.startswith(prefix)])
    return sorted(arms, key=lambda arm: float(arm.removeprefix(prefix)))


def _whole(rows: pd.DataFrame, arms: list[str]) -> list[str]:
    """Those of some arms that have every seed that any of them has."""
    seeds = rows[rows.arm.isin(arms)].groupby("arm").seed.unique().map(set)
    return [arm for arm in arms if arm in seeds.index and seeds[arm] == set().union(*seeds)]


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


def c1(sft_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Token-averaged SFT gains more in a_r than in a_p.

    A gain is over the base, which has never put the parts of a response together. The second part needs no base: when
    training ends, a_r is ahead of a_p.
    """
    yield "C1", difference_of_gains(sft_rows, "token_averaged", "base", resamples=resamples), 0.0
    weights = {("token_averaged", "a_r"): 1, ("token_averaged", "a_p"): -1}
    yield "C1 gap is left", stats.contrast(sft_rows, weights, resamples), 0.0


def c2(imbalance: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """On the way of token-averaged SFT, perception's share of the loss < its share of the tokens ≪ ½.

    Over all batches of the base and of the token-averaged arm; batches are resampled as problems are elsewhere.
    """
    batches = imbalance[imbalance.arm.isin(["base", "token_averaged"])].rename(columns={"batch": "problem_id"})
    batches = batches.assign(lag=batches.token_share - batches.loss_share, below=0.5 - batches.token_share)
    yield "C2", stats.accuracy(batches, "lag", resamples=resamples), 0.0
    yield "C2 far below half", stats.accuracy(batches, "below", resamples=resamples), QUARTER


def c3(sft_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """The best fixed λ beats token-averaged SFT in a."""
    yield "C3", best_against(sft_rows, mixtures(sft_rows, "lambda_"), ["token_averaged"], resamples), 0.0


def c4(sft_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """NGDiff beats token-averaged SFT in a, and falls behind the best fixed λ by less than `MARGIN`."""
    yield "C4", paired_difference(sft_rows, "ngdiff", "token_averaged", "a", resamples), 0.0
    yield "C4 not worse", best_against(sft_rows, ["ngdiff"], mixtures(sft_rows, "lambda_"), resamples), -MARGIN


def c5(sft_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Along λ, a is best at neither end; from the lowest to the highest, a_p rises and a_r falls.

    Token averaging is taken for the point with the smallest λ, perception's share of the tokens: all λ must be larger.
    """
    arms = [arm for arm in ("token_averaged", *mixtures(sft_rows, "lambda_")) if arm in set(sft_rows.arm)]
    yield "C5 interior", best_against(sft_rows, arms[1:-1], arms[:1] + arms[-1:], resamples), 0.0
    rises = falls = UNTESTED
    if len(arms) > 1:
        rises = paired_difference(sft_rows, arms[-1], arms[0], "a_p", resamples)
        falls = paired_difference(sft_rows, arms[0], arms[-1], "a_r", resamples)
    yield "C5 a_p rises", rises, 0.0
    yield "C5 a_r falls", falls, 0.0


def x1(dose_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Token-averaged SFT leaves a wider gap a_r − a_p with the longest reasoning than with the shortest.

    A gap can also close because reasoning is not learned, so the other parts look at a_p alone: token averaging sees
    less with the longest reasoning than with the shortest, and by more than NGDiff does (it lags).
    """
    rows = dose_rows[dose_rows.axis == "length"]
    levels = sorted(rows.level.unique())
    gap = falls = lag = UNTESTED
    if len(levels) > 1:
        rows = rows[rows.level.isin([levels[0], levels[-1]])]
        rows = rows.assign(arm=rows.level.map({levels[0]: "short ", levels[-1]: "long "}) + rows.arm)
        average, balanced = "token_averaged", "ngdiff"
        weights = {(f"long {average}", "a_r"): 1, (f"long {average}", "a_p"): -1}
        weights |= {(f"short {average}", "a_r"): -1, (f"short {average}", "a_p"): 1}
        gap = stats.contrast(rows, weights, resamples)
        falls = paired_difference(rows, f"short {average}", f"long {average}", "a_p", resamples)
        weights = {(f"long {balanced}", "a_p"): 1, (f"long {average}", "a_p"): -1}
        weights |= {(f"short {balanced}", "a_p"): -1, (f"short {average}", "a_p"): 1}
        lag = stats.contrast(rows, weights, resamples)
    yield "X1", gap, 0.0
    yield "X1 perception falls", falls, 0.0
    yield "X1 perception lags", lag, 0.0


def x3(sft_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Re-weighting by NGDiff beats perception first, then token averaging, in a, at an equal budget of tokens."""
    yield "X3", paired_difference(sft_rows, "ngdiff", "perception_first", "a", resamples), 0.0


# ---- reinforcement learning ------------------------------------------------------------------------------------------


def c6(rl_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Outcome-only GRPO gains more in a_r than in a_p; and it gains in a_r, where a_p might only have fallen."""
    yield "C6", difference_of_gains(rl_rows, "outcome", "start", resamples=resamples), 0.0
    yield "C6 a_r rises", paired_difference(rl_rows, "outcome", "start", "a_r", resamples), 0.0


def c7(rollouts: pd.DataFrame, counterfactual: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """On the start's rollouts, the outcome follows reasoning (counterfactual reading) more than perception.

    Pooled; further parts take off what the null model predicts from the base rates, and what it predicts if it also
    knows how often a wrong perception is forgiven. Which reading of reasoning the paper's figures are is not known: the
    last part takes the own one, into which, where few misread problems can be solved, perception enters, too.
    """
    start = rollouts[rollouts.arm == "start"]
    paired = counterfactual_reading(start, counterfactual)
    gap, beyond_null, beyond_forgiveness = coupling_gap(paired, resamples)
    yield "C7", gap, 0.0
    yield "C7 beyond the null", beyond_null, 0.0
    yield "C7 beyond forgiveness", beyond_forgiveness, 0.0
    yield "C7 own reading", coupling_gap(start.assign(reasoning=start.a_own), resamples)[0], 0.0


def c8(rl_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """The best α > 0 beats outcome-only (α = 0) in a, and a is best neither at α = 0 nor at the highest α.

    The third part pays graded perception instead of exact.
    """
    arms = mixtures(rl_rows, "alpha_")
    yield "C8", best_against(rl_rows, arms, ["outcome"], resamples), 0.0
    yield "C8 interior", best_against(rl_rows, arms[:-1], ["outcome", *arms[-1:]], resamples), 0.0
    yield "C8 graded", best_against(rl_rows, mixtures(rl_rows, "graded_"), ["outcome"], resamples), 0.0


def c9(rl_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """The best label-free surrogate beats outcome-only in a."""
    arms = [arm for arm in CANDIDATES if arm in set(rl_rows.arm)]
    yield "C9", best_against(rl_rows, arms, ["outcome"], resamples), 0.0


def c10(rl_rows: pd.DataFrame, screening: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """The higher a surrogate's r with exact a_p, pooled or within groups, the larger its gain in a over outcome-only.

    Spearman's ρ. What is random here are the surrogates, as draws of what one might have tried: n counts them, and the
    interval is over them (Fisher's z with the standard error of Bonett and Wright, Psychometrika 65, 2000). With fewer
    than five, any order may come by chance, and it is nan. Surrogates that lack a seed of the others are left out.
    """
    trained = _whole(rl_rows, [*CANDIDATES, CONTROL])
    gained = {arm: paired_difference(rl_rows, arm, "outcome", "a", 2) for arm in trained}  # no interval is used
    gains = pd.Series({arm: gain.estimate for arm, gain in gained.items()}, dtype=float)
    for claim, scope in (("C10", "pooled"), ("C10 within groups", "within_group")):
        exact = screening[(screening.perception == "a_p") & (screening.scope == scope)]
        scores = exact.set_index("surrogate").r.dropna()
        arms = [arm for arm in gains.dropna().index if arm in scores]
        yield claim, _ranks(scores[arms], gains[arms], rl_rows.seed.nunique()), 0.0


def _ranks(scores: pd.Series, gains: pd.Series, seeds: int) -> Estimate:
    if len(scores) < 2:
        return UNTESTED
    varied = scores.nunique() > 1 < gains.nunique()
    rho = float(scipy.stats.spearmanr(scores, gains).statistic) if varied else np.nan
    low = high = np.nan
    if len(scores) >= 5:
        error = scipy.stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (len(scores) - 3))
        with np.errstate(divide="ignore"):  # ρ = 1 lies at infinity, and stays 1
            low, high = np.tanh(np.arctanh(round(rho, 12)) + error * np.array([-1, 1]))
    return Estimate(rho, float(low), float(high), len(scores), seeds)


def x2(rl_rows: pd.DataFrame, resamples: int) -> Iterator[Part]:
    """Span-routed credit beats the best mixed reward in a; either credit beats outcome-only.

    Re-weighted credit pays for the outcome alone: if token imbalance held RL back, too, that would be its cure.
    """
    yield "X2", best_against(rl_rows, ["span_routed"], mixtures(rl_rows, "alpha_"), resamples), 0.0
    yield "X2 routed", paired_difference(rl_rows, "span_routed", "outcome", "a", resamples), 0.0
    yield "X2 re-weighted", best_against(rl_rows, mixtures(rl_rows, "reweighted_"), ["outcome"], resamples), 0.0


# ---- the table -------------------------------------------------------------------------------------------------------

CLAIMS = (
    (c1, "sft_rows"),
    (c2, "imbalance"),
    (c3, "sft_rows"),
    (c4, "sft_rows"),
    (c5, "sft_rows"),
    (c6, "rl_rows"),
    (c7, "rollouts", "counterfactual"),
    (c8, "rl_rows"),
    (c9, "rl_rows"),
    (c10, "rl_rows", "screening"),
    (x1, "dose_rows"),
    (x2, "rl_rows"),
    (x3, "sft_rows"),
)


def claims(
    sft_rows: pd.DataFrame | None = None,
    rl_rows: pd.DataFrame | None = None,
    imbalance: pd.DataFrame | None = None,
    rollouts: pd.DataFrame | None = None,
    counterfactual: pd.DataFrame | None = None,
    screening: pd.DataFrame | None = None,
    dose_rows: pd.DataFrame | None = None,
    resamples: int = 1000,
) -> pd.DataFrame:
    """One line per claim × task × family, in `COLUMNS`; claims that need a table that is None are left out.

    `sft_rows` hold the arms base, token_averaged, lambda_…, ngdiff, perception_first; `rl_rows` start, outcome,
    alpha_…, graded_…, span_routed, reweighted_… and surrogates; `rollouts` and `counterfactual` those of the arm start;
    `dose_rows` token_averaged and ngdiff, with axis and level; `imbalance` and `screening` are the tables of those
    names.
    """
    given = {"sft_rows": sft_rows, "rl_rows": rl_rows, "imbalance": imbalance}
    given |= {"rollouts": rollouts, "counterfactual": counterfactual, "screening": screening}
    given["dose_rows"] = dose_rows
    parts = {name: dict(iter(t.groupby(["task", "family"]))) for name, t in given.items() if t is not None}
    records = []
    for test, *needed in CLAIMS:
        if not set(needed) <= set(parts):
            continue
        for task, family in set.intersection(*(set(parts[name]) for name in needed)):
            tables = [parts[name][task, family] for name in needed]
            alone = _by_seed(test, tables, resamples)
            for claim, estimate, threshold in test(*tables, resamples):
                line = {"claim": claim, "task": task, "family": family, **asdict(estimate)}
                line |= {"by_seed": alone.get(claim, ""), "paper": PAPER.get(claim, "yes")}
                records.append(line | {"verdict": verdict(estimate.low, estimate.high, threshold)})
    return _sorted(pd.DataFrame(records, columns=COLUMNS))


def _by_seed(test: Callable[..., Iterator[Part]], tables: list[pd.DataFrame], resamples: int) -> dict[str, str]:
    """The estimates at each of several seeds alone, by claim, in the order of the seeds.

    A seed alone also chooses its own best arm, or the one that is hardest to beat, where a claim is about several. C10
    holds its gains against the screening of all seeds.
    """
    seeds, found = sorted(tables[0].seed.unique()), {}
    for seed in seeds if len(seeds) > 1 else []:
        of_seed = [table[table.seed == seed] if "seed" in table else table for table in tables]
        for claim, estimate, _ in test(*of_seed, resamples):
            digits = 2 if claim in CORRELATIONS else 1
            found.setdefault(claim, []).append(f"{estimate.estimate:.{digits}f}")
    return {claim: ", ".join(values) for claim, values in found.items() if set(values) != {"nan"}}


def recompute(results: Path) -> pd.DataFrame:
    """The claims of a study, from nothing but the rows and tables in its results folder.

    Raises ParamsError where the folder holds no study's results.
    """
    manifest = read_manifest(results)
    if "params" not in manifest:
        raise ParamsError(f"{results}: must be the results folder of a study, with its manifest.json")
    stored = {"sft_rows": "rows/sft.parquet", "rl_rows": "rows/rl.parquet", "dose_rows": "rows/dose.parquet"}
    stored |= {"rollouts": "rows/rollouts.parquet", "imbalance": "tables/imbalance.csv"}
    stored |= {"screening": "tables/screening.csv"}
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    tables = {name: read[path.suffix](path) for name, file in stored.items() if (path := results / file).exists()}
    if not tables:
        raise ParamsError(f"{results}: has none of the rows and tables that claims are made of")
    if "rollouts" in tables:
        mode = tables["rollouts"]["mode"]
        tables["counterfactual"] = tables["rollouts"][mode == "counterfactual"]
        tables["rollouts"] = tables["rollouts"][mode == "end_to_end"]
    return claims(**tables, resamples=manifest["params"]["bootstrap"])


def record(path: Path, found: pd.DataFrame) -> pd.DataFrame:
    """Put the lines of `found` into the claims table at `path`, in place of those of the same claim × task × family.

    The table is made if new, and returned, by number of claim.
    """
    keys = ["claim", "task", "family"]
    old = read_claims(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    kept = old[~old.set_index(keys).index.isin(found.set_index(keys).index)]
    table = _sorted(pd.DataFrame([*kept.to_dict("records"), *found.to_dict("records")], columns=COLUMNS))
    write_csv(path, table)
    return table


def read_claims(path: Path) -> pd.DataFrame:
    """The claims table at `path`; a single seed leaves `by_seed` empty, not undefined."""
    return pd.read_csv(path, dtype={"by_seed": str}).fillna({"by_seed": ""})


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    number = table.claim.str.extract(r"^[A-Z](\d+)", expand=False).astype(float)
    table = table.assign(letter=table.claim.str[0], number=number)
    return table.sort_values(["letter", "number", "claim", "task", "family"], ignore_index=True)[COLUMNS]
