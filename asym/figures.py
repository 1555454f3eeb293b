"""The study's figures: a DataFrame in, a matplotlib Figure out, and `save`.

Perception is always orange and reasoning blue (seaborn's colour-blind palette), end-to-end accuracy dark grey; arms are
told apart by place and label, never by these colours. Whiskers are the 95 % intervals of the table, bands the spread
over seeds. A table holds one model family. Call `style()` once before drawing.
"""

import itertools
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
    "routed_perception": "routed, perception alone",
}
GREEK = {
    **{"lambda_": ("λ", "token_averaged"), "alpha_": ("α", "outcome")},
    **{"graded_": ("graded α", "outcome"), "reweighted_": ("re-weighted λ", "span_routed")},
}


ACROSS = 5  # panels that fit beside each other on a page


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
    fig.suptitle(sized(title, table))
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
    fig.suptitle(sized(over, table))
    return fig


# ---- curves ----------------------------------------------------------------------------------------------------------


def training_curves(metrics: pd.DataFrame) -> Figure:
    """Loss of either segment (nats per token, log scale) against the step, a panel per arm and task."""
    lines = {
        "loss_perception": ("perception", PERCEPTION, "-"),
        "loss_reasoning": ("reasoning", REASONING, "-"),
    }
    return _curves(metrics, lines, "Loss of perception and reasoning tokens in training", "nats per token", log=True)


def accuracy_curves(curves: pd.DataFrame, goal: pd.Series | None = None) -> Figure:
    """a_p, a_r and a (points) against the step, from the table of `stats.curves`, a panel per arm and task.

    Of few arms a dashed line stands at the `goal` of each task (points of a; its name says what it is).
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
    """Mean of the logged rewards against the step, a panel per arm and task; of surrogates, the one an arm is paid.

    Each step has other problems, so a running mean over a tenth of the steps is drawn. Answer consistency, logged in
    every arm, is the reasoning about what the response itself states.
    """
    lines = {
        "reward_outcome": ("outcome", END_TO_END, "-"),
        "reward_perception": ("perception", PERCEPTION, "-"),
        "reward_answer_consistency": ("own reasoning", REASONING, "-"),
        "reward_perception_graded": ("perception, graded", PERCEPTION, "--"),
        "reward_format": ("format", QUIET, ":"),
    }
    own = metrics.drop(columns=list(lines), errors="ignore").to_dict("records")
    metrics = metrics.assign(paid=[row.get(f"reward_{row['arm']}", np.nan) for row in own])
    if metrics.paid.notna().any():
        lines["paid"] = ("the surrogate it is paid", SURROGATE, "-.")
    width = max(1, metrics.step.nunique() // 10)
    drawn = metrics.sort_values("step").set_index("step").groupby(["task", "arm", "seed"])
    known = [column for column in lines if column in metrics]
    means = drawn[known].rolling(width, min_periods=1, center=True).mean().reset_index()
    over = f", running mean of {width} steps" * (width > 1)
    return _curves(means, lines, f"Rewards during GRPO{over}", "mean reward")


def _curves(
    metrics: pd.DataFrame, lines: dict, title: str, ylabel: str, log: bool = False, limits: tuple | None = None
) -> Figure:
    """`lines`: column -> (label, colour, dash); the mean over seeds, and a band from the lowest to the highest.

    A row per arm and a column per task; of many arms, for each task rows of `ACROSS`.
    """
    arms, tasks, seeds = ordered(metrics.arm), tasks_of(metrics), metrics.groupby("arm").seed.nunique()
    many = len(arms) >= ACROSS
    fig, axes = _wrapped(arms, tasks) if many else panels(arms, tasks, 6, 3.4, sharex=True, sharey=True)
    ends = {}
    for (arm, task), ax in axes.items():
        ends[ax] = _lines(ax, metrics[(metrics.arm == arm) & (metrics.task == task)], lines)
        if log:  # set after drawing: on a log axis seaborn would take the geometric mean
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_title(f"{TASKS.get(task, task)}, {display(arm)}" if not many else display(arm))
        if limits:  # None would keep the limits of the panel drawn first
            ax.set_ylim(limits)
    bands = "; bands: lowest to highest" * bool(seeds.max() > 1)
    fig.suptitle(f"{title} ({seeded(seeds)}{bands})")
    fig.supylabel(ylabel)
    if not many:
        fig.supxlabel("step")
        return _name(fig, ends)
    for arm in arms[-(len(arms) % ACROSS or ACROSS) :]:
        axes[arm, tasks[-1]].set_xlabel("step")
    for arm, task in itertools.product(arms[::ACROSS], tasks):
        axes[arm, task].set_ylabel(TASKS.get(task, task))
    drawn = {name for ended in ends.values() for _, _, name, _ in ended}
    keys = {name: Line2D([], [], color=color, ls=dash) for name, color, dash in lines.values() if name in drawn}
    fig.legend(keys.values(), keys, ncols=min(len(keys), ACROSS), frameon=False, loc="outside lower center")
    return fig


def _wrapped(arms: list[str], tasks: list[str]) -> tuple[Figure, dict]:
    """Panels by (arm, task): below each other the tasks, and in each rows of `ACROSS` arms."""
    lines = -(-len(arms) // ACROSS)
    rows = [(task, line) for task in tasks for line in range(lines)]
    fig, grid = panels(rows, range(ACROSS), 3.9, 2.7, sharex=True, sharey=True)
    axes = {}
    for (row, column), ax in grid.items():
        task, place = row[0], row[1] * ACROSS + column
        if place < len(arms):
            axes[arms[place], task] = ax
            ax.tick_params(labelbottom=place + ACROSS >= len(arms))  # also above an empty place
        else:
            ax.set_axis_off()
    return fig, axes


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


# ---- layout ----------------------------------------------------------------------------------------------------------


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


def panels(rows: list[str], columns: list[str], width: float, height: float, **share) -> tuple[Figure, dict]:
    """A figure of rows × columns panels of that size in inches, and its axes by (row, column)."""
    size = (width * len(columns), height * len(rows) + 0.8)
    fig, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained", **share)
    return fig, {(row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}


def tasks_of(table: pd.DataFrame) -> list[str]:
    """The tasks of a table in the order they are drawn."""
    return sorted(table.task.unique(), reverse=True)  # Sudoku, then Graph Coloring


def sized(title: str, table: pd.DataFrame) -> str:
    """A title with the problems and seeds that a table rests on."""
    return f"{title} ({counted(table.n.max(), 'problem')}, {seeded(table.seeds)})"


def seeded(seeds: pd.Series) -> str:
    """How many seeds there are, "1 to 3 seeds" where arms differ; what was not run has none and does not count."""
    fewest, most = seeds[seeds > 0].min(), seeds.max()
    return f"{fewest:.0f} to " * bool(fewest < most) + counted(most, "seed")


def counted(number: float, noun: str) -> str:
    """A number with its noun: 1 seed, 3 seeds."""
    return f"{number:.0f} {noun}{'' if number == 1 else 's'}"
