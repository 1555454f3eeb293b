"""The study's figures: a DataFrame in, a matplotlib Figure out, and `save`.

Perception is always orange and reasoning blue (seaborn's colour-blind palette), end-to-end accuracy dark grey; arms are
told apart by place and label, never by these colours. Whiskers are the 95 % intervals of the table, bands the spread
over seeds. A table holds one model family. Call `style()` once before drawing.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

PERCEPTION, REASONING = (sns.color_palette("colorblind")[i] for i in (1, 0))
END_TO_END, QUIET, SURROGATE = "#444444", "#8c8c8c", sns.color_palette("colorblind")[2]
BARS = {"a_p": ("perception", PERCEPTION), "a_r": ("reasoning", REASONING), "a": ("end to end", END_TO_END)}
TASKS = {"sudoku": "Sudoku", "graph_coloring": "Graph Coloring"}
ARMS = {  # in the order they are drawn; the mixtures of `GREEK` follow the arm before them here
    "base": "base",
    "start": "start",
    "token_averaged": "token-averaged",
    "outcome": "outcome only",
    "ngdiff": "NGDiff",
    "uncertainty": "equal losses",
    "pcgrad": "PCGrad",
    "perception_first": "perception first",
    "self_blindfold": "self-blindfold",
    "solver_blindfold": "solver-blindfold",
    "validity": "validity",
    "group_agreement": "group agreement",
    "image_dependence": "image dependence",
    "answer_consistency": "answer consistency",
    "span_routed": "span-routed",
}
GREEK = {
    **{"lambda_": ("λ", "token_averaged"), "alpha_": ("α", "outcome")},
    **{"graded_": ("graded α", "outcome"), "reweighted_": ("re-weighted λ", "span_routed")},
}


def style() -> None:
    """Fonts that stay legible at half size, and few lines."""
    lean = {"axes.spines.right": False, "axes.spines.top": False, "figure.labelsize": 18}
    sns.set_theme(context="talk", style="ticks", rc=lean)


def save(fig: Figure, stem: str | Path) -> None:
    """Writes `stem`.svg and `stem`.png (150 dpi), each in one move, with the same bytes for the same figure."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        partial = f"{stem}.partial.{suffix}"
        with plt.rc_context({"svg.hashsalt": "asym"}):
            fig.savefig(partial, dpi=150, bbox_inches="tight", metadata=metadata)
        os.replace(partial, f"{stem}.{suffix}")


def display(arm: str) -> str:
    """An arm's name for readers: "lambda_0.5" -> "λ = 0.5"; unknown names only lose their underscores."""
    for prefix, (symbol, _) in GREEK.items():
        if arm.startswith(prefix):
            return f"{symbol} = {arm.removeprefix(prefix)}"
    return ARMS.get(arm, arm.replace("_", " "))


def ordered(arms) -> list[str]:
    """Arms in the order they are drawn: as in `ARMS`, mixtures by weight, unknown ones last by name."""
    place = list(ARMS)

    def key(arm):
        for prefix, (_, before) in GREEK.items():
            if arm.startswith(prefix):
                return place.index(before) + 0.5, list(GREEK).index(prefix), float(arm.removeprefix(prefix))
        return place.index(arm) if arm in place else len(place), 0, arm

    return sorted(set(arms), key=key)


# ---- bars ------------------------------------------------------------------------------------------------------------


def accuracy_bars(table: pd.DataFrame) -> Figure:
    """a_p, a_r and a per arm, one panel per task, from the table of `stats.measures` (points)."""
    fig = _bars(table, "Accuracy", "accuracy (points)")
    fig.axes[0].set_xlim(0, 105)
    return fig


def gain_bars(table: pd.DataFrame, baseline: str) -> Figure:
    """Gains over `baseline` in a_p, a_r and a per arm, one panel per task, from the table of `stats.gains` (points)."""
    return _bars(table, f"Gain over {display(baseline)}", "gain (points)")


def _bars(table: pd.DataFrame, title: str, xlabel: str) -> Figure:
    """A row of three bars per arm, so that many arms still fit a page."""
    arms = ordered(table.arm)
    fig, axes = panels([""], tasks_of(table), 6.5, 0.8 * len(arms) + 1.6, sharex=True, sharey=True)
    for (_, task), ax in axes.items():
        for offset, (measure, (label, color)) in zip((-0.27, 0, 0.27), BARS.items(), strict=True):
            part = table[(table.task == task) & (table.measure == measure)].set_index("arm").reindex(arms)
            place = np.arange(len(arms)) + offset
            ax.barh(place, part.estimate, 0.25, color=color, label=label)
            _intervals(ax, place, part)
        ax.set_yticks(range(len(arms)), [display(arm) for arm in arms])
        ax.axvline(0, color="black", lw=1)
        ax.set(title=TASKS.get(task, task), xlabel=xlabel, ylim=(len(arms) - 0.5, -0.5))
    fig.suptitle(f"{title} ({counted(table.n.max(), 'problem')}, {counted(table.seeds.max(), 'seed')})")
    fig.legend(*ax.get_legend_handles_labels(), ncols=3, frameon=False, loc="outside lower center")
    return fig


def _intervals(ax: Axes, places, table: pd.DataFrame) -> None:
    for color, width in (("white", 4), ("black", 2)):  # a rim, to be seen on the dark bars
        ax.hlines(places, table.low, table.high, color=color, lw=width)


def gain_by_reading(table: pd.DataFrame, baseline: str) -> Figure:
    """What problems add to an arm's gain in a by who read them right: a panel per task.

    From the table of `stats.gain_by_reading` for one arm.
    """
    readings = list(dict.fromkeys(table.reading))
    fig, axes = panels([""], tasks_of(table), 7, 0.7 * len(readings) + 1.6, sharex=True, sharey=True)
    for (_, task), ax in axes.items():
        part = table[table.task == task].set_index("reading").reindex(readings)
        ax.barh(readings, part.estimate, 0.6, color=END_TO_END)
        _intervals(ax, readings, part)
        ax.set_yticks(range(len(readings)), readings)
        ax.axvline(0, color="black", lw=1)
        ax.set(title=f"{TASKS.get(task, task)}: {part.estimate.sum():+.1f} in all", xlabel="adds to the gain (points)")
        ax.set_ylim(len(readings) - 0.5, -0.5)
    (arm,) = table.arm.unique()
    over = f"{display(arm)} over {display(baseline)}, end to end"
    fig.suptitle(f"{over} ({counted(table.n.max(), 'problem')}, {counted(table.seeds.max(), 'seed')})")
    return fig


# ---- curves ----------------------------------------------------------------------------------------------------------


def training_curves(metrics: pd.DataFrame) -> Figure:
    """Loss of either segment (nats per token, log scale) against the step: a row per arm, a column per task."""
    lines = {
        "loss_perception": ("perception", PERCEPTION, "-"),
        "loss_reasoning": ("reasoning", REASONING, "-"),
    }
    return _curves(metrics, lines, "Loss of perception and reasoning tokens in training", "nats per token", log=True)


def accuracy_curves(curves: pd.DataFrame, goal: pd.Series | None = None) -> Figure:
    """a_p, a_r and a (points) against the step, from the table of `stats.curves`: a row per arm, a column per task.

    A dashed line stands at the `goal` of each task (points of a; its name says what it is).
    """
    lines = {measure: (label, color, "-") for measure, (label, color) in BARS.items()}
    title = "Accuracy along training, validation problems"
    fig = _curves(curves, lines, title, "accuracy (points)", limits=(0, 105))
    if goal is not None:
        fig.suptitle(f"{fig.get_suptitle()}\ndashed: {goal.name}")
        for ax, task in zip(fig.axes, tasks_of(curves) * curves.arm.nunique(), strict=True):
            ax.axhline(goal[task], color=END_TO_END, lw=1.5, ls="--")
    return fig


def reward_curves(metrics: pd.DataFrame) -> Figure:
    """Mean of every logged reward against the step: a row per arm, a column per task.

    Answer consistency, logged in every arm, is the reasoning about what the response itself states.
    """
    lines = {
        "reward_outcome": ("outcome", END_TO_END, "-"),
        "reward_perception": ("perception", PERCEPTION, "-"),
        "reward_answer_consistency": ("own reasoning", REASONING, "-"),
        "reward_perception_graded": ("perception, graded", PERCEPTION, "--"),
        "reward_format": ("format", QUIET, ":"),
    }
    surrogates = [column for column in metrics if column.startswith("reward_") and column not in lines]
    lines |= {column: (display(column.removeprefix("reward_")), SURROGATE, "-.") for column in surrogates}
    return _curves(metrics, lines, "Rewards during GRPO", "mean reward")


def _curves(
    metrics: pd.DataFrame, lines: dict, title: str, ylabel: str, log: bool = False, limits: tuple | None = None
) -> Figure:
    """`lines`: column -> (label, colour, dash); the mean over seeds, and a band from the lowest to the highest."""
    arms, seeds = ordered(metrics.arm), metrics.seed.nunique()
    fig, axes = panels(arms, tasks_of(metrics), 6, 3.4 if len(arms) < 4 else 2.8, sharex=True, sharey=True)
    ends = {}
    for (arm, task), ax in axes.items():
        ends[ax] = _lines(ax, metrics[(metrics.arm == arm) & (metrics.task == task)], lines)
        if log:  # set after drawing: on a log axis seaborn would take the geometric mean
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(f"{TASKS.get(task, task)}, {display(arm)}")
        if limits:  # None would keep the limits of the panel drawn first
            ax.set_ylim(limits)
    bands = "; bands: lowest to highest" * (seeds > 1)
    fig.suptitle(f"{title} ({counted(seeds, 'seed')}{bands})")
    fig.supxlabel("step")
    fig.supylabel(ylabel)
    return _name(fig, ends)


def lambda_path(metrics: pd.DataFrame) -> Figure:
    """λ_t, gradient norms of both segments and their cosine against the step, a column per task.

    Only steps at which gradient norms were taken are shown: those of NGDiff. Dotted: the λ of token averaging.
    """
    metrics = metrics.dropna(subset="grad_norm_perception")
    rows = {
        "λ": {"lambda": ("λ", END_TO_END, "-")},
        "gradient norm": {
            "grad_norm_perception": ("perception", PERCEPTION, "-"),
            "grad_norm_reasoning": ("reasoning", REASONING, "-"),
        },
        "cosine": {"grad_cosine": ("cosine", END_TO_END, "-")},
    }
    tasks = tasks_of(metrics)
    fig, axes = panels(list(rows), tasks, 7, 3.2, sharex=True, sharey="row")
    ends = {}
    for (row, task), ax in axes.items():
        drawn = _lines(ax, metrics[metrics.task == task], rows[row])
        ends[ax] = drawn if len(drawn) > 1 else []
        ax.set_ylabel(row if task == tasks[0] else "")
    for task in tasks:
        axes["λ", task].set(title=TASKS.get(task, task), ylim=(0, 1))
        implied = metrics[metrics.task == task].token_share.mean()
        axes["λ", task].axhline(implied, color=END_TO_END, lw=1.5, ls=":")
        axes["cosine", task].axhline(0, color=QUIET, lw=1)
    seeds = metrics.seed.nunique()
    bands = "; bands: lowest to highest" * (seeds > 1)
    fig.suptitle(f"NGDiff: λ (dotted: token averaging's) and the two gradients\n({counted(seeds, 'seed')}{bands})")
    fig.supxlabel("step")
    return _name(fig, ends)


def shares(imbalance: pd.DataFrame) -> Figure:
    """Perception's share of tokens, loss and gradient norm (%): a row per arm, a column per task.

    Against the step, with a band of one standard deviation over batches and seeds; an arm measured at one step only has
    a dot per batch and a line at their mean.
    """
    kinds = {"token_share": ("tokens", "-"), "loss_share": ("loss", "--"), "gradient_share": ("gradient", ":")}
    lines = {column: (label, PERCEPTION, dash) for column, (label, dash) in kinds.items()}
    percent = imbalance.assign(**{column: 100 * imbalance[column] for column in kinds})
    fig, axes = panels(ordered(imbalance.arm), tasks_of(imbalance), 7, 3.6, sharey=True)
    ends = {}
    for (arm, task), ax in axes.items():
        part = percent[(percent.arm == arm) & (percent.task == task)]
        if part.step.nunique() > 1:
            ends[ax] = _lines(ax, part, lines, "sd")
            ax.set_xlabel("step")
        else:
            for place, column in enumerate(kinds):
                ax.scatter(place + np.linspace(-0.2, 0.2, len(part)), part[column], color=PERCEPTION, s=25, alpha=0.5)
                ax.hlines(part[column].mean(), place - 0.3, place + 0.3, color=PERCEPTION, lw=4)
            ax.set_xticks(range(len(kinds)), [label for label, _ in kinds.values()])
        ax.set_title(f"{TASKS.get(task, task)}, {display(arm)}")
    ax.set_ylim(0, 1.05 * percent[list(kinds)].max().max())
    bands = " (bands: ± 1 standard deviation)" * (imbalance.step.nunique() > 2)
    fig.suptitle(f"Perception's share of tokens, loss and gradient norm{bands}")
    fig.supylabel("share (%)")
    return _name(fig, ends)


def _lines(ax: Axes, table: pd.DataFrame, lines: dict, errorbar=("pi", 100)) -> list[tuple]:
    """Draws each line over `step` and returns where it ends: (x, y, label, colour)."""
    marker = "o" if table.step.nunique() < 8 else None
    ends = []
    for column, (label, color, dash) in lines.items():
        part = table.dropna(subset=column) if column in table else table.iloc[:0]
        if len(part):
            sns.lineplot(part, x="step", y=column, ax=ax, color=color, ls=dash, errorbar=errorbar, marker=marker)
            last = part.step.max()
            ends.append((last, part[part.step == last][column].mean(), label, color))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set(xlabel="", ylabel="")
    return ends


def _name(fig: Figure, ends: dict[Axes, list[tuple]]) -> Figure:
    """Writes each line's name at its end, moved up where it would cover another's; needs the final limits."""
    fig.draw_without_rendering()
    for ax, lines in ends.items():
        free = -np.inf  # points; below it there are names already
        for x, y, label, color in sorted(lines, key=lambda line: line[1]):
            height = ax.transData.transform((x, y))[1] * 72 / fig.dpi
            offset = (8, max(free - height, 0))
            ax.annotate(label, (x, y), offset, textcoords="offset points", color=color, va="center", size=14)
            free = height + offset[1] + 17
    return fig


# ---- claims ----------------------------------------------------------------------------------------------------------


VERDICTS = {"reproduced": ("o", "black"), "inconclusive": ("s", QUIET), "not reproduced": ("X", "#b2182b")}
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
    tasks, lines = tasks_of(claims), [len(claim) + 2 for claim in names.values()]
    height = 0.5 * sum(lines) / len(lines)
    grid = {"height_ratios": lines}
    fig, axes = panels(list(units), tasks, 6.5, height, sharex="row", sharey="row", gridspec_kw=grid)
    for (unit, task), ax in axes.items():
        ax.axvline(0, color="black", lw=1)
        for row in units[unit][units[unit].task == task].itertuples():
            place = names[unit].index(row.claim)
            if np.isnan(row.estimate):
                ax.annotate(" not run", (0, place), va="center", color=QUIET, size=14)
                continue
            marker, color = VERDICTS[row.verdict]
            ax.hlines(place, row.low, row.high, color=color, lw=3)
            ax.plot(row.estimate, place, marker, color=color, ms=11)
        ax.set_yticks(range(len(names[unit])), [f"{c.split()[0]}  {CLAIMS.get(c, c)}" for c in names[unit]])
        ax.set(xlabel=unit, ylim=(len(names[unit]) - 0.5, -0.5))
    for task in tasks:
        axes[next(iter(units)), task].set_title(TASKS.get(task, task))
    keys = [Line2D([], [], color=color, marker=mark, lw=3, label=word) for word, (mark, color) in VERDICTS.items()]
    fig.suptitle(f"Claims and verdicts ({counted(claims.seeds.max(), 'seed')})")
    fig.legend(handles=keys, ncols=3, frameon=False, loc="outside lower center")
    return fig


def samples(images: Sequence[Image.Image], titles: Sequence[str]) -> Figure:
    """Images with their titles, at most four to a row."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(title, size=16)
    return fig


# ---- layout ----------------------------------------------------------------------------------------------------------


def panels(rows: list[str], columns: list[str], width: float, height: float, **share) -> tuple[Figure, dict]:
    """A figure of rows × columns panels of that size in inches, and its axes by (row, column)."""
    size = (width * len(columns), height * len(rows) + 0.8)
    fig, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained", **share)
    return fig, {(row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}


def tasks_of(table: pd.DataFrame) -> list[str]:
    """The tasks of a table in the order they are drawn."""
    return sorted(table.task.unique(), reverse=True)  # Sudoku, then Graph Coloring


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 seed, 3 seeds."""
    return f"{number:.0f} {noun}{'' if number == 1 else 's'}"
