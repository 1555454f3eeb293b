"""Token imbalance, measured three ways on the same batches: perception's share of tokens, of loss, of gradient norm.

All three are shares of the token-averaged loss, Σ_p/n + Σ_r/n: what perception contributes to what the stock trainer
minimises. Its share of the tokens is fixed by the data; the other two say how much of the signal it really is.
"""

from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
import torch
from torch.utils.data import DataLoader

from asym import models, stats
from asym.data import drawn_by, training_rows
from asym.params import Params
from asym.runs import Run, progress, repo_root
from asym.sft import SegmentCollator, token_losses
from asym.training import threads
from asym.transcript import PERCEPTION, REASONING


def measure_shares(
    p: Params, trained: Run, task: str, stage: str, arm: str, seed: int, step: int, batches: int = 8
) -> pd.DataFrame:
    """Shares of perception at a checkpoint, one row per batch of SFT data; from the run's cache where they exist.

    Gradients are those of what training moves (`models.as_trained`).

    Returns:
        Columns task, family, seed, stage, arm, step, batch, token_share, loss_share, gradient_share (0..1), and
        loss_perception, loss_reasoning (nats per token).
    """
    keys = ("verbosity", "variation", "n_train_sft", "sft_batch", "trained_parts", "lora_rank", "dtype", "attention")
    keys += ("max_new_tokens",) * (p.data != "generated")
    config = {key: getattr(p, key) for key in keys} | drawn_by(p, task)
    config |= {"trained": trained.folder.name, "task": task, "seed": seed, "batches": batches}
    run = Run.open(repo_root(), f"shares-{task}", config)
    with threads(p.threads):
        rows = run.table(lambda: _shares(p, trained, task, arm, seed, batches))
    about = {"task": task, "family": p.family, "seed": seed, "stage": stage, "arm": arm, "step": step}
    return rows.assign(**about)[[*about, *rows]]


def _shares(p: Params, trained: Run, task: str, arm: str, seed: int, batches: int) -> pd.DataFrame:
    model, processor = models.load(trained.checkpoint, p)
    model.eval()
    model = models.as_trained(model, p, seed)  # only what training moves has a say
    data = training_rows(p, task, seed, processor)
    # The same batches for every checkpoint, and none that any arm has seen more often than others
    order, collator = torch.Generator().manual_seed(seed), SegmentCollator(processor)
    loader = DataLoader(data, p.sft_batch, shuffle=True, generator=order, collate_fn=list)
    parameters = [q for q in model.parameters() if q.requires_grad]
    rows = []
    total = min(batches, len(loader))
    with progress(f"shares {task} {arm}", total) as bar:
        for index, batch in zip(range(total), loader, strict=False):
            counts, sums = [0, 0], [0.0, 0.0]
            grads = [[torch.zeros_like(q, dtype=torch.float32) for q in parameters] for _ in range(2)]
            for row in batch:  # one response at a time: a released model has no room for more
                losses, segments = token_losses(model, collator([row]))
                for k, segment in enumerate((PERCEPTION, REASONING)):
                    value = (losses * (segments == segment)).sum()
                    counts[k] += int((segments == segment).sum())
                    sums[k] += value.item()
                    found = torch.autograd.grad(value, parameters, retain_graph=not k, allow_unused=True)
                    for summed, grad in zip(grads[k], found, strict=True):
                        summed += 0 if grad is None else grad
            norms = [torch.stack([g.norm() for g in grad]).norm().item() for grad in grads]
            shares = {"token_share": counts, "loss_share": sums, "gradient_share": norms}
            means = {"loss_perception": sums[0] / counts[0], "loss_reasoning": sums[1] / counts[1]}
            rows.append({"batch": index} | {k: v[0] / sum(v) for k, v in shares.items()} | means)
            bar.update()
    return pd.DataFrame(rows)


# ---- dose and response -----------------------------------------------------------------------------------------------

AXES = {"length": "verbosity", "entropy": "variation", "difficulty": "difficulty"}  # what each axis turns
RESPONSE = ["task", "problem_id", "mode", "arm", "seed"]  # what tells the responses of a dose apart
SHARES = ("token_share", "loss_share", "gradient_share")


def doses(p: Params, task: str) -> dict[tuple[str, float], Params]:
    """The study of a task at several levels of one knob, by (axis, level): how long, how free, how hard to see.

    The study's own level is one of every axis that has any.
    """
    found = {}
    for axis, knob in AXES.items():
        asked, name = getattr(p, f"dose_{knob}"), _parameter(axis, task)
        for level in sorted({*asked, getattr(p, name)}) if asked else []:
            changed = {name: level}
            if axis == "length" and level > p.verbosity:  # a longer response needs more room
                changed["max_new_tokens"] = p.max_new_tokens * (1 + level) // (1 + p.verbosity)
            found[axis, level] = p.model_copy(update=changed)
    return found


def _parameter(axis: str, task: str) -> str:
    """The parameter that an axis turns for a task."""
    return f"difficulty_{task}" if axis == "difficulty" else AXES[axis]


def path_shares(metrics: pd.DataFrame) -> pd.DataFrame:
    """What a trainer logged, with perception's shares of loss and gradient in the token-averaged loss at each step.

    Logged losses and norms are those of the means L_p and L_r; the shares are those of the sums they weigh in.
    """
    weight = metrics.token_share
    loss_p, loss_r = weight * metrics.loss_perception, (1 - weight) * metrics.loss_reasoning
    push_p, push_r = weight * metrics.grad_norm_perception, (1 - weight) * metrics.grad_norm_reasoning
    return metrics.assign(loss_share=loss_p / (loss_p + loss_r), gradient_share=push_p / (push_p + push_r))


def dose_response(rows: pd.DataFrame, metrics: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """Gap, lag and gain at every dose, beside perception's mean shares along token-averaged training.

    Args:
        rows: responses of the arms token_averaged and ngdiff with the columns axis, level and own (whether it is the
            study's own level) besides theirs.
        metrics: what token-averaged training logged, with task, axis and level.

    Returns:
        Columns task, family, axis, level, own, response, estimate, low, high (points), n, seeds, and the three shares.
        Responses are "gap" (a_r − a_p of token-averaged SFT), "lag" and "gain" (of NGDiff over it in a_p and in a) and
        of either arm a_p, a_r, a and parse_failure, as "ngdiff a_p". A gap can close because reasoning fails, a lag
        cannot; failures tell either from responses that a high dose cut off.
    """
    shares = path_shares(metrics).groupby(["task", "axis", "level"])[list(SHARES)].mean()
    kinds = {"gap": {("token_averaged", "a_r"): 1, ("token_averaged", "a_p"): -1}}
    kinds |= {"lag": {("ngdiff", "a_p"): 1, ("token_averaged", "a_p"): -1}}
    kinds |= {"gain": {("ngdiff", "a"): 1, ("token_averaged", "a"): -1}}
    kinds |= {
        f"{arm} {measure}": {(arm, measure): 1}
        for arm in ("token_averaged", "ngdiff")
        for measure in ("a_p", "a_r", "a", "parse_failure")
    }
    records = []
    for (task, family, axis, level, own), part in rows.groupby(["task", "family", "axis", "level", "own"], sort=False):
        about = {"task": task, "family": family, "axis": axis, "level": level, "own": own}
        for response, weights in kinds.items():
            estimate = stats.contrast(part, weights, resamples)
            records.append(about | {"response": response} | asdict(estimate) | shares.loc[task, axis, level].to_dict())
    return pd.DataFrame(records)


def on_every_axis(rows: pd.DataFrame, p: Params) -> pd.DataFrame:
    """Rows of doses, with those of the study's own dose on every axis of their task, wherever they were kept."""
    own = rows[rows.own].drop_duplicates(RESPONSE)
    parts = []
    for axis in AXES:
        of_axis = rows[~rows.own & (rows.axis == axis)]
        for task in of_axis.task.unique():
            level = float(getattr(p, _parameter(axis, task)))
            parts += [of_axis[of_axis.task == task], own[own.task == task].assign(axis=axis, level=level)]
    return pd.concat(parts, ignore_index=True) if parts else rows


def distinct(table: pd.DataFrame, keys: Sequence[str] = ("task", "response")) -> pd.DataFrame:
    """The table of `dose_response`, or rows by `RESPONSE`, with the study's own dose once and not on every axis."""
    return table[~(table.own & table.duplicated([*keys, "own"]))]


def share_predicts(table: pd.DataFrame) -> pd.DataFrame:
    """Does a smaller share go with a larger lag, and with a wider gap? Spearman's ρ over the doses of `distinct`.

    Once over the doses that change the balance of the text (length and entropy), once over all: what is hard to see
    lags for another reason. Shares that differ by less than 0.1 points, as those of the tokens along entropy, are ties.

    Returns:
        Columns response ("lag", "gap"), task, share, over ("text" or "all"), rho, p (one-sided, of a ρ as low as this
        by chance), doses.
    """
    records = []
    for (response, task), part in table[table.response.isin(["lag", "gap"])].groupby(["response", "task"], sort=False):
        for over, chosen in (("text", part[part.own | (part.axis != "difficulty")]), ("all", part)):
            for share in SHARES:
                rho, chance = stats.rank_agreement(-chosen[share].round(3), chosen.estimate)
                about = {"response": response, "task": task, "share": share, "over": over}
                records.append(about | {"rho": -rho, "p": chance, "doses": len(chosen)})
    return pd.DataFrame(records)
