"""Figures of how something follows a quantity: the gap and the cure the dose, correlations two rates, a policy gradient
its reward, cost the size of the work.

DataFrame in, Figure out, in the style of `figures`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from asym import figures, stats

DOSES = {"length": "verifications of the solution", "entropy": "freedom of the trace"}
DOSES["difficulty"] = "difficulty of the drawing"


def points(ax: Axes, table: pd.DataFrame, x, style: str, color, **options) -> None:
    """Estimates with their intervals at the places `x`."""
    error = [table.estimate - table.low, table.high - table.estimate]
    ax.errorbar(x, table.estimate, error, fmt=style, color=color, capsize=3, **options)


def dose_response(table: pd.DataFrame) -> Figure:
    """a_p and a_r (points) at every dose, token-averaged solid and NGDiff dashed: a row per task, a column per axis.

    From the table of `imbalance.dose_response`; the doses of an axis stand at equal distances.
    """
    arms = {"token_averaged": ("o-", -0.06), "ngdiff": ("D--", 0.06)}  # a little apart, so that neither hides
    lines = {
        f"{arm} {measure}": (style, figures.BARS[measure][1], shift)
        for arm, (style, shift) in arms.items()
        for measure in ("a_p", "a_r")
    }
    fig, axes = _doses(table, lines, "accuracy (points)")
    for ax in axes:
        ax.set_ylim(0, 105)
    fig.suptitle(figures.sized("Dose and response", table))
    keys = [Line2D([], [], color=figures.BARS[m][1], lw=4, label=figures.BARS[m][0]) for m in ("a_p", "a_r")]
    keys += [Line2D([], [], color="black", marker="o", label=figures.display("token_averaged"))]
    keys += [Line2D([], [], color="black", marker="D", ls="--", label=figures.display("ngdiff"))]
    fig.legend(handles=keys, ncols=4, frameon=False, loc="outside lower center")
    return fig


RESPONSES = {
    "gap": ("gap of token-averaged: a_r − a_p", "s:", figures.QUIET),
    "lag": ("lag: NGDiff − token-averaged in a_p", "o-", figures.PERCEPTION),
    "gain": ("gain: the same in a", "D--", figures.END_TO_END),
}


def dose_gains(table: pd.DataFrame) -> Figure:
    """Gap, lag and gain (points) at every dose: a row per task, a column per axis, as in `dose_response`."""
    lines = {name: (style, color, 0.1 * (i - 1)) for i, (name, (_, style, color)) in enumerate(RESPONSES.items())}
    fig, axes = _doses(table, lines, "points")
    for ax in axes:
        ax.axhline(0, color="black", lw=1)
    fig.suptitle(figures.sized("What imbalance costs, and what balance gains", table))
    keys = [Line2D([], [], color=c, marker=s[0], ls=s[1:], label=label) for label, s, c in RESPONSES.values()]
    fig.legend(handles=keys, frameon=False, loc="outside lower center")
    return fig


def _doses(table: pd.DataFrame, lines: dict, ylabel: str) -> tuple[Figure, list[Axes]]:
    """`lines`: response -> (style, colour, shift); the study's own dose is named under its level."""
    axes_of, tasks = list(dict.fromkeys(table.axis)), figures.tasks_of(table)
    fig, axes = figures.panels(tasks, axes_of, 4.8, 3.8, sharey=True)
    for (task, axis), ax in axes.items():
        part = table[(table.task == task) & (table.axis == axis)].sort_values("level")
        levels = part.drop_duplicates("level")
        for response, (style, color, shift) in lines.items():
            points(ax, part[part.response == response], np.arange(len(levels)) + shift, style, color)
        names = [f"{dose.level:g}" + "\nstudy" * dose.own for dose in levels.itertuples()]
        ax.set_xticks(range(len(levels)), names)
        ax.set(title=figures.TASKS.get(task, task), xlabel=DOSES[axis] if task == tasks[-1] else "")
        ax.set_ylabel(ylabel if axis == axes_of[0] else "")
    return fig, list(axes.values())


def dose_map(table: pd.DataFrame) -> Figure:
    """Where imbalance bites: gap, lag and gain (points) of every dose as a heat map, a column per task.

    From the table of `imbalance.distinct`. A star marks those whose interval excludes zero. The study's own dose stands
    on top.
    """
    shown = table[table.response.isin(RESPONSES)]
    doses = np.where(shown.own, "the study's", shown.axis + " " + shown.level.map("{:g}".format))
    place = shown.axis.map(list(DOSES).index).where(~shown.own, -1)
    shown = shown.assign(dose=doses, place=place).sort_values(["place", "level"], kind="stable")
    shown = shown.assign(dose=pd.Categorical(shown.dose, list(dict.fromkeys(shown.dose))))
    star = np.where((shown.low > 0) | (shown.high < 0), "*", "")
    shown = shown.assign(text=shown.estimate.map("{:+.0f}".format) + star)
    limit = max(shown.estimate.abs().max(), 1)
    borders = np.flatnonzero(np.diff(shown.drop_duplicates("dose").place)) + 1
    fig, axes = figures.panels([""], list(RESPONSES), 5.2, 0.55 * shown.dose.nunique() + 1, sharey=True)
    for (_, response), ax in axes.items():
        part = shown[shown.response == response].set_index(["dose", "task"])
        grid, text = (part[each].unstack()[figures.tasks_of(table)] for each in ("estimate", "text"))
        grid = grid.rename(columns=figures.TASKS)
        sns.heatmap(grid, vmin=-limit, vmax=limit, cmap="vlag", annot=text, fmt="", cbar=False, ax=ax)
        ax.hlines(borders, *ax.get_xlim(), color="black", lw=1.5)
        ax.set(title=RESPONSES[response][0].replace(": ", ":\n"), xlabel="", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    fig.suptitle("Where imbalance bites (points; * interval excludes zero)")
    return fig


def share_predicts_lag(table: pd.DataFrame, agreement: pd.DataFrame) -> Figure:
    """The lag (points) over perception's share of tokens, loss and gradient (%): a dot per dose, a row per task.

    From the tables of `imbalance.distinct` and `imbalance.share_predicts`, whose ρ stand in the titles. Doses that
    change the drawings and not the text are hollow.
    """
    lags, agreement = table[table.response == "lag"], agreement[agreement.response == "lag"]
    shares = {"token_share": "tokens", "loss_share": "loss", "gradient_share": "gradient"}
    fig, axes = figures.panels(figures.tasks_of(table), list(shares), 4.8, 4.2, sharex="col", sharey="row")
    marks = {axis: mark for axis, mark in zip(DOSES, "os^", strict=True) if axis in set(lags.axis[~lags.own])}
    for (task, share), ax in axes.items():
        of_task = lags[lags.task == task]
        parts = {"the study's own dose": (of_task[of_task.own], "*")}
        parts |= {axis: (of_task[~of_task.own & (of_task.axis == axis)], mark) for axis, mark in marks.items()}
        for label, (part, mark) in parts.items():
            hollow = {"mfc": "none"} if label == "difficulty" else {}
            color, size = figures.PERCEPTION, 18 if mark == "*" else 11
            points(ax, part, 100 * part[share], mark, color, ms=size, mew=2, label=label, **hollow)
        rho = agreement[(agreement.task == task) & (agreement.share == share)].set_index("over").rho
        ax.set_title(f"{figures.TASKS.get(task, task)}\nρ = {rho['text']:.2f} (all doses {rho['all']:.2f})", size=15)
        ax.axhline(0, color=figures.QUIET, lw=1)
        ax.set_xlabel(f"share of {shares[share]} (%)" if task == figures.tasks_of(table)[-1] else "")
        ax.set_ylabel("lag in a_p (points)" if share == "token_share" else "")
    fig.suptitle(figures.sized("Does a smaller share mean a larger lag?", table))
    fig.legend(*ax.get_legend_handles_labels(), ncols=4, frameon=False, loc="outside lower center")
    return fig


def frontier(table: pd.DataFrame, weights: pd.Series) -> Figure:
    """a (top), a_p and a_r (below) over the weight λ of perception, a column per task, with 95 % intervals.

    Args:
        table: of `stats.measures`, in points.
        weights: mean λ of training, by (task, arm). Token averaging and the fixed weights make the line; arms that set
            λ themselves stand at their mean, hollow and named.
    """
    fig, axes = figures.panels(["a", "halves"], figures.tasks_of(table), 8, 4.4, sharex=True, sharey="row")
    drawn = table[(table.measure == "a") & table.arm.isin(weights.index.unique(1))]
    top = {"a": min(1.2 * drawn.high.max() + 2, 105), "halves": 105}  # with room for names above the peak
    for (row, task), ax in axes.items():
        here = table[(table.task == task) & table.arm.isin(weights[task].index)]
        here = here.assign(weight=here.arm.map(weights[task])).sort_values("weight")
        on_line = (here.arm == "token_averaged") | here.arm.str.startswith("lambda_")
        for measure in ["a"] if row == "a" else ["a_p", "a_r"]:
            color = figures.BARS[measure][1]
            line, alone = (part[part.measure == measure] for part in (here[on_line], here[~on_line]))
            points(ax, line, line.weight, "o-", color)
            points(ax, alone, alone.weight, "D", color, mfc="none", mew=2, ms=13, zorder=3)
        if row == "a":
            named = ~on_line | (here.arm == "token_averaged")
            for arm in here[named & (here.measure == "a")].itertuples():
                averaged = arm.arm == "token_averaged"
                below = averaged and arm.low > 0.1 * top["a"]  # its line goes up; without room, above other names
                place, offset = (arm.low, (0, -8)) if below else (arm.high, (0, 26 if averaged else 8))
                sides = {"ha": "left" if averaged else "center", "va": "top" if below else "bottom"}
                ax.annotate(
                    figures.display(arm.arm),
                    (arm.weight, place),
                    offset,
                    textcoords="offset points",
                    size=13,
                    bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.7},  # the line passes behind names
                    **sides,
                )
            ax.set_title(figures.TASKS.get(task, task))
        low = -0.03 * top[row]  # or points at 0 are cut in half
        ax.set(xlabel="weight of perception λ" if row == "halves" else "", ylim=(low, top[row]), xlim=(0, 1))
    axes["a", figures.tasks_of(table)[0]].set_ylabel("end to end (points)")
    axes["halves", figures.tasks_of(table)[0]].set_ylabel("halves (points)")
    keys = [Line2D([], [], color=color, marker="o", label=label) for label, color in figures.BARS.values()]
    keys += [Line2D([], [], color="black", marker="D", mfc="none", mew=2, ls="", label="sets λ itself (mean)")]
    fig.legend(handles=keys, ncols=4, frameon=False, loc="outside lower center")
    fig.suptitle(figures.sized("What the weight buys", table))
    return fig


def alpha_frontier(table: pd.DataFrame) -> Figure:
    """a, a_p and a_r (points) over α, a column per task: exact perception paid (solid), graded (dashed).

    From the table of `stats.measures`; outcome-only is α = 0 of both.
    """
    fig, axes = figures.panels([""], figures.tasks_of(table), 7, 5, sharey=True)
    for (_, task), ax in axes.items():
        for prefix, style, aside in (("alpha_", "o-", -0.006), ("graded_", "D--", 0.006)):
            weight = {"outcome": 0.0}
            weight |= {arm: float(arm.removeprefix(prefix)) for arm in table.arm.unique() if arm.startswith(prefix)}
            here = table[(table.task == task) & table.arm.isin(weight)]
            here = here.assign(weight=here.arm.map(weight)).sort_values("weight")
            for place, (measure, (_, color)) in enumerate(figures.BARS.items(), -1):
                line = here[here.measure == measure]
                if line.weight.nunique() > 1:  # side by side, or one interval hides another
                    points(ax, line, line.weight + 0.012 * place + aside, style, color)
        ax.set(title=figures.TASKS.get(task, task), xlabel="weight of perception α", xlim=(-0.05, 1.05), ylim=(0, 105))
    axes["", figures.tasks_of(table)[0]].set_ylabel("accuracy (points)")
    keys = [Line2D([], [], color=color, lw=4, label=label) for label, color in figures.BARS.values()]
    if table.arm.str.startswith("graded_").any():
        if table.arm.str.startswith("alpha_").any():
            keys += [Line2D([], [], color="black", marker="o", label="exact a_p paid")]
        keys += [Line2D([], [], color="black", marker="D", ls="--", label="graded a_p paid")]
    fig.legend(handles=keys, ncols=3, frameon=False, loc="outside lower center")
    fig.suptitle(figures.sized("What α buys", table))
    return fig


def coupling_vs_null(coupling: pd.DataFrame) -> Figure:
    """corr(outcome, perception) and corr(outcome, reasoning): measured (dot), and what two nulls make of rates.

    Diamond: a wrong perception is always fatal; square: it is forgiven as often as was measured.

    One panel per task, one line per arm, reading and scope of the table of `coupling.coupling_table`.
    """
    several = coupling.arm.nunique() > 1
    lines = list(coupling.groupby(["arm", "reading", "scope"]).groups)
    lines.sort(key=lambda line: (figures.ordered(coupling.arm).index(line[0]), line[1:]))
    fig, axes = figures.panels([""], figures.tasks_of(coupling), 7, 1.1 * len(lines) + 2.2, sharex=True, sharey=True)
    for (_, task), ax in axes.items():
        for place, (arm, reading, scope) in enumerate(lines):
            part = coupling[(coupling.task == task) & (coupling.arm == arm)]
            part = part[(part.reading == reading) & (part.scope == scope)].set_index("pair")
            for half, color, shift in (
                ("perception", figures.PERCEPTION, -0.15),
                ("reasoning", figures.REASONING, 0.15),
            ):
                if (pair := f"outcome~{half}") in part.index:
                    row = part.loc[pair]
                    ax.hlines(place + shift, row.low, row.high, color=color, lw=3)
                    ax.plot(row.r, place + shift, "o", color=color, ms=11)
                    ax.plot(row.null, place + shift, "D", mfc="white", mec=color, mew=2, ms=9)
                    ax.plot(row.forgiving, place + shift, "s", mfc="white", mec=color, mew=2, ms=9)
        names = [f"{reading}\n{scope.replace('_', ' ')}" for _, reading, scope in lines]
        if several:
            names = [f"{figures.display(arm)}, {name}" for (arm, *_), name in zip(lines, names, strict=True)]
        ax.set_yticks(range(len(lines)), names)
        ax.set(title=figures.TASKS.get(task, task), xlabel="correlation r", ylim=(len(lines) - 0.5, -0.5))
    fig.suptitle(f"What the outcome follows, beside the null model ({figures.counted(coupling.n.max(), 'problem')})")
    keys = [
        Line2D([], [], color=figures.PERCEPTION, marker="o", lw=3, label="outcome ~ perception"),
        Line2D([], [], color=figures.REASONING, marker="o", lw=3, label="outcome ~ reasoning"),
        Line2D([], [], color="black", marker="D", mfc="white", mew=2, lw=0, label="null model"),
        Line2D([], [], color="black", marker="s", mfc="white", mew=2, lw=0, label="forgiving null"),
    ]
    fig.legend(handles=keys, ncols=2, frameon=False, loc="outside lower center")
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
