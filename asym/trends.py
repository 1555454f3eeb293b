"""Figures of how something follows a quantity: the gap and the cure the dose, correlations two rates, a policy gradient
its reward, cost the size of the work.

DataFrame in, Figure out, in the style of `figures`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from asym import figures, stats

DOSES = {"length": "verifications of the solution", "entropy": "freedom of the trace"}
DOSES["difficulty"] = "difficulty of the drawing"


def dose_response(table: pd.DataFrame) -> Figure:
    """a_p and a_r (points) over the dose, token-averaged solid and NGDiff dashed: a row per task, a column per axis.

    From the table of `imbalance.dose_response`.
    """
    axes_of = list(dict.fromkeys(table.axis))
    fig, axes = figures.panels(figures.tasks_of(table), axes_of, 6, 4, sharex="col", sharey=True)
    for (task, axis), ax in axes.items():
        part = table[(table.task == task) & (table.axis == axis)].sort_values("level")
        for arm, style in (("token_averaged", "o-"), ("ngdiff", "D--")):
            for measure in ("a_p", "a_r"):
                line = part[part.response == f"{arm} {measure}"]
                error = [line.estimate - line.low, line.high - line.estimate]
                ax.errorbar(line.level, line.estimate, error, fmt=style, color=figures.BARS[measure][1], capsize=3)
        ax.set(title=f"{figures.TASKS.get(task, task)}, {axis}", ylim=(0, 105), xticks=sorted(part.level.unique()))
        ax.set_xlabel(DOSES[axis] if task == figures.tasks_of(table)[-1] else "")
        ax.set_ylabel("accuracy (points)" if axis == axes_of[0] else "")
    fig.suptitle(
        f"Dose and response ({figures.counted(table.n.max(), 'problem')}, {figures.counted(table.seeds.max(), 'seed')})"
    )
    keys = [Line2D([], [], color=figures.BARS[m][1], lw=4, label=figures.BARS[m][0]) for m in ("a_p", "a_r")]
    keys += [Line2D([], [], color="black", marker="o", label=figures.display("token_averaged"))]
    keys += [Line2D([], [], color="black", marker="D", ls="--", label=figures.display("ngdiff"))]
    fig.legend(handles=keys, ncols=4, frameon=False, loc="outside lower center")
    return fig


def dose_map(table: pd.DataFrame) -> Figure:
    """Where imbalance bites: gap and gain (points) of every dose as a heat map, a column per task.

    A star marks those whose interval excludes zero.
    """
    responses = {"gap": "gap of token-averaged: a_r − a_p", "gain": "gain of NGDiff in a"}
    doses = table.axis + " " + table.level.map("{:g}".format)
    table = table.assign(dose=pd.Categorical(doses, list(dict.fromkeys(doses))))
    fig, axes = figures.panels([""], list(responses), 7, 0.55 * doses.nunique() + 1, sharey=True)
    shown = table[table.response.isin(responses)]
    star = np.where((shown.low > 0) | (shown.high < 0), "*", "")
    shown = shown.assign(text=shown.estimate.map("{:+.0f}".format) + star)
    limit = max(shown.estimate.abs().max(), 1)
    for (_, response), ax in axes.items():
        part = shown[shown.response == response].set_index(["dose", "task"])
        grid, text = (part[each].unstack()[figures.tasks_of(table)] for each in ("estimate", "text"))
        grid = grid.rename(columns=figures.TASKS)
        sns.heatmap(grid, vmin=-limit, vmax=limit, cmap="vlag", annot=text, fmt="", cbar=False, ax=ax)
        ax.set(title=responses[response], xlabel="", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    fig.suptitle("Where imbalance bites (points; * interval excludes zero)")
    return fig


def share_predicts_gap(table: pd.DataFrame) -> Figure:
    """The gap of token-averaged SFT over perception's share of tokens, loss and gradient (%): a dot per dose and task.

    Titles give Spearman's ρ over the dots of each task: what sets its level differs between them.
    """
    gaps = table[table.response == "gap"]
    shares = {"token_share": "tokens", "loss_share": "loss", "gradient_share": "gradient"}
    fig, axes = figures.panels([""], list(shares), 5.5, 4.5, sharey=True)
    marks = dict(zip(figures.tasks_of(table), "os", strict=False))
    for (_, share), ax in axes.items():
        rho = {}
        for task, mark in marks.items():
            part = gaps[gaps.task == task]
            rho[figures.TASKS.get(task, task)] = part[share].corr(part.estimate, method="spearman")
            ax.plot(
                100 * part[share],
                part.estimate,
                mark,
                color=figures.END_TO_END,
                ms=10,
                label=figures.TASKS.get(task, task),
            )
        ax.axhline(0, color=figures.QUIET, lw=1)
        title = "\n".join(f"{task}: ρ = {value:.2f}" for task, value in rho.items())
        ax.set(title=title, xlabel=f"perception's share of {shares[share]} (%)")
    axes["", "token_share"].set_ylabel("gap a_r − a_p (points)")
    fig.legend(*ax.get_legend_handles_labels(), ncols=2, frameon=False, loc="outside lower center")
    return fig


def alpha_frontier(table: pd.DataFrame) -> Figure:
    """a, a_p and a_r (points) over α, a column per task: exact perception paid (solid), graded (dashed).

    From the table of `stats.measures`; outcome-only is α = 0 of both.
    """
    fig, axes = figures.panels([""], figures.tasks_of(table), 7, 5, sharey=True)
    for (_, task), ax in axes.items():
        for prefix, style in (("alpha_", "o-"), ("graded_", "D--")):
            weight = {"outcome": 0.0}
            weight |= {arm: float(arm.removeprefix(prefix)) for arm in table.arm.unique() if arm.startswith(prefix)}
            here = table[(table.task == task) & table.arm.isin(weight)]
            here = here.assign(weight=here.arm.map(weight)).sort_values("weight")
            for measure, (_, color) in figures.BARS.items():
                line = here[here.measure == measure]
                error = [line.estimate - line.low, line.high - line.estimate]
                if line.weight.nunique() > 1:
                    ax.errorbar(line.weight, line.estimate, error, fmt=style, color=color, capsize=3)
        ax.set(title=figures.TASKS.get(task, task), xlabel="weight of perception α", xlim=(-0.05, 1.05), ylim=(0, 105))
    axes["", figures.tasks_of(table)[0]].set_ylabel("accuracy (points)")
    keys = [Line2D([], [], color=color, lw=4, label=label) for label, color in figures.BARS.values()]
    keys += [Line2D([], [], color="black", marker="o", label="exact a_p paid")]
    keys += [Line2D([], [], color="black", marker="D", ls="--", label="graded a_p paid")]
    fig.legend(handles=keys, ncols=3, frameon=False, loc="outside lower center")
    counts = (figures.counted(table.n.max(), "problem"), figures.counted(table.seeds.max(), "seed"))
    fig.suptitle(f"What α buys ({', '.join(counts)})")
    return fig


def null_map(perception: tuple[float, float], reasoning: tuple[float, float]) -> Figure:
    """Rates (p, q) at which `stats.null_correlations` fall within two ranges: each (light), both (dark)."""
    rates = np.linspace(0.001, 0.999, 999)
    p, q = np.meshgrid(rates, rates)
    found = stats.null_correlations(p, q)
    inside = [(low <= r) & (r <= high) for r, (low, high) in zip(found, (perception, reasoning), strict=True)]
    fig, axes = figures.panels([""], [""], 7, 6)
    (ax,) = axes.values()
    for area, color in zip(inside, (figures.PERCEPTION, figures.REASONING), strict=True):
        ax.contourf(p, q, area, levels=[0.5, 1.5], colors=[color], alpha=0.35)
    ax.contourf(p, q, inside[0] & inside[1], levels=[0.5, 1.5], colors=["black"], alpha=0.75)
    ax.plot([0, 1], [0, 1], color=figures.QUIET, lw=1, ls=":")
    ax.set(xlabel="rate of perception p", ylabel="rate of reasoning q", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    names = ("outcome ~ perception", "outcome ~ reasoning")
    keys = [
        Patch(color=color, alpha=0.35, label=f"{name} in {low:.2f}–{high:.2f}")
        for name, color, (low, high) in zip(
            names, (figures.PERCEPTION, figures.REASONING), (perception, reasoning), strict=True
        )
    ]
    fig.legend(
        handles=[*keys, Patch(color="black", alpha=0.75, label="both")], frameon=False, loc="outside lower center"
    )
    fig.suptitle("Where two rates alone give these correlations")
    return fig


def gradient_directions(table: pd.DataFrame) -> Figure:
    """Cosine with the perception gradient and signal-to-noise of every reward: a column per task, with 95 % intervals.

    From the table of `credit.gradient_table`.
    """
    rewards = [name for name in ("perception", "perception_graded", "mixed", "outcome") if name in set(table.reward)]
    rewards += figures.ordered(set(table.reward) - set(rewards))
    rows = {"cosine": "cosine with the perception gradient", "signal_to_noise": "signal-to-noise per prompt group"}
    height = 0.5 * len(rewards) + 1.2
    fig, axes = figures.panels(list(rows), figures.tasks_of(table), 7, height, sharex="row", sharey=True)
    for (measure, task), ax in axes.items():
        part = table[(table.task == task) & (table.measure == measure)].set_index("reward").reindex(rewards)
        special = dict.fromkeys(("perception", "perception_graded"), figures.PERCEPTION)
        special |= dict.fromkeys(("outcome", "mixed"), figures.END_TO_END)
        for place, line in enumerate(part.itertuples()):
            color = special.get(line.Index, figures.SURROGATE)
            ax.hlines(place, line.low, line.high, color=color, lw=3)
            ax.plot(line.estimate, place, "o", color=color, ms=11)
        ax.axvline(0, color="black", lw=1)
        names = {"perception": "exact perception", "perception_graded": "graded perception", "mixed": "α = 0.5"}
        ax.set_yticks(range(len(rewards)), [names.get(each, figures.display(each)) for each in rewards])
        ax.set(title=figures.TASKS.get(task, task) if measure == "cosine" else "", xlabel=rows[measure])
        ax.set_ylim(len(rewards) - 0.5, -0.5)
        if part.estimate.isna().all():
            ax.set_xlim(-0.5, 1.05)
    fig.suptitle(f"Which way a reward's policy gradient points ({figures.counted(table.n.max(), 'problem')})")
    return fig


def cost_growth(growth: pd.DataFrame) -> Figure:
    """Seconds over each size, both logarithmic, with the exponent of every line in its panel's legend."""
    axes = ["response tokens", "batch", "group", "parameters"]
    works = dict(zip(sorted(growth.work.unique()), ("o-", "s--"), strict=False))
    fig, drawn = plt.subplots(1, len(axes), figsize=(20, 5.5), sharey=True, layout="constrained")
    for ax, axis in zip(drawn, axes, strict=True):
        for work, part in growth[growth.axis == axis].groupby("work"):
            exponent = f"{work}: {part.exponent.iloc[0]:.2f} ± {part.standard_error.iloc[0]:.2f}"
            whiskers = [part.seconds - part.low, part.high - part.seconds]
            ax.errorbar(part["size"], part.seconds, whiskers, fmt=works[work], color=figures.END_TO_END, label=exponent)
        sizes = sorted(growth["size"][growth.axis == axis].unique())
        ax.set(xscale="log", yscale="log", xlabel=axis)
        ax.set_xticks(sizes, [f"{size / 1e6:.1f} M" if size >= 1e5 else f"{size:g}" for size in sizes])
        ax.set_xticks([], minor=True)
        ax.legend(title="exponent", frameon=False, fontsize="x-small", title_fontsize="x-small")
    drawn[0].set_ylabel("seconds")
    return fig
