"""The figure of the claims table: every claim's estimate, interval and verdict."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from asym import figures

VERDICTS = {"reproduced": ("o", "black"), "inconclusive": ("s", figures.QUIET), "not reproduced": ("X", "#b2182b")}
CLAIMS = {
    "C1": "SFT: gain in a_r − gain in a_p",
    "C1 gap is left": "token-averaged: a_r − a_p",
    "C2": "share of tokens − share of loss",
    "C2 far below half": "½ − share of tokens",
    "C3": "best λ − token-averaged",
    "C4": "NGDiff − token-averaged",
    "C4 not worse": "NGDiff − best λ",
    "C5 a_p rises": "a_p, highest λ − lowest",
    "C5 a_r falls": "a_r, lowest λ − highest",
    "C5 interior": "best inner λ − best end",
    "C6": "GRPO: gain in a_r − gain in a_p",
    "C6 a_r rises": "GRPO: gain in a_r",
    "C7": "r with reasoning − with perception",
    "C7 beyond the null": "r difference beyond the null",
    "C7 beyond forgiveness": "beyond the forgiving null",
    "C7 own reading": "r with own reasoning − perception",
    "C8": "best α − outcome only",
    "C8 interior": "best inner α − best end",
    "C8 graded": "best graded α − outcome only",
    "C9": "best surrogate − outcome only",
    "C10": "ρ of screening and gain",
    "C10 within groups": "ρ, screening within groups",
    "X1": "gap, longest reasoning − shortest",
    "X1 perception falls": "a_p, shortest reasoning − longest",
    "X1 perception lags": "lag behind NGDiff in a_p, likewise",
    "X2": "span-routed − best α",
    "X2 routed": "span-routed − outcome only",
    "X2 re-weighted": "re-weighted − outcome only",
    "X3": "NGDiff − perception first",
}


def claims_forest(claims: pd.DataFrame) -> Figure:
    """Every claim's estimate and interval, marked by verdict: a column per task, correlations below the others."""
    correlation = claims.claim.str.match("C7|C10")
    units = {"points": claims[~correlation], "r": claims[correlation]}
    units = {unit: part for unit, part in units.items() if len(part)}
    names = {unit: list(dict.fromkeys(part.claim)) for unit, part in units.items()}
    tasks, lines = figures.tasks_of(claims), [len(claim) + 2 for claim in names.values()]
    height = 0.5 * sum(lines) / len(lines)
    grid = {"height_ratios": lines}
    fig, axes = figures.panels(list(units), tasks, 6.5, height, sharex="row", sharey="row", gridspec_kw=grid)
    for (unit, task), ax in axes.items():
        ax.axvline(0, color="black", lw=1)
        for row in units[unit][units[unit].task == task].itertuples():
            place = names[unit].index(row.claim)
            if np.isnan(row.estimate):
                ax.annotate(" not run", (0, place), va="center", color=figures.QUIET, size=14)
                continue
            marker, color = VERDICTS[row.verdict]
            ax.hlines(place, row.low, row.high, color=color, lw=3)
            ax.plot(row.estimate, place, marker, color=color, ms=11)
        ax.set_yticks(range(len(names[unit])), [f"{c.split()[0]}  {CLAIMS.get(c, c)}" for c in names[unit]])
        ax.set(xlabel=unit, ylim=(len(names[unit]) - 0.5, -0.5))
    for task in tasks:
        axes[next(iter(units)), task].set_title(figures.TASKS.get(task, task))
    keys = [Line2D([], [], color=color, marker=mark, lw=3, label=word) for word, (mark, color) in VERDICTS.items()]
    fig.suptitle(f"Claims and verdicts ({figures.seeded(claims.seeds)})")
    fig.legend(handles=keys, ncols=3, frameon=False, loc="outside lower center")
    return fig
