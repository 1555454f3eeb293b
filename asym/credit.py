"""Which tokens get the credit of a reward, and which way its policy gradient points.

*Credit*: GRPO gives every token of a rollout the same advantage. Here perception tokens may get another one:

- `span_routed` [ours]: perception tokens get the group-relative advantage of exact perception, the others that of the
  outcome.
- `routed_perception` [ours]: the same, but the others get none. Paid exact perception for every token (`alpha_1`), a
  model may lose its reasoning to the noise of advantages that say nothing of it; here it cannot.
- `reweighted_<λ>`: all get the outcome's, but the loss is λ·(mean over perception tokens) + (1 − λ)·(mean over the
  others), as SFT weighs them; as an advantage per token that is A·λ·N/n_p and A·(1 − λ)·N/n_r of N = n_p + n_r tokens.

*Gradients*: ∇ Σ A·log π of the rollouts of one checkpoint, for several rewards, beside the gradient of perception: that
of exact perception through the perception tokens. Whether perception is right does not depend on the tokens after it,
so neither the routed credit nor this gradient pays for anything else.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from asym import stats
from asym.params import CREDITS
from asym.runs import progress
from asym.sft import SegmentCollator, token_losses
from asym.transcript import CLOSING, PERCEPTION

SKETCH = 4096  # dimensions a gradient is hashed to: inner products then err by 1/64 of the norms


def group_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """(r − mean) / (std + 1e-4) within each prompt's `group` consecutive rollouts, as TRL's: (B,) → (B,)."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def perception_mask(tokenizer, completions: torch.Tensor) -> torch.Tensor:
    """Which tokens (B, T) lie before the end of the perception span: all in a row that never closes it.

    The token that completes the closing tag is found by bisection, so that any tokenizer will do.
    """
    ends = []
    for ids in completions.tolist():
        first, last = 0, len(ids)
        while first < last:
            middle = (first + last) // 2
            closed = CLOSING in tokenizer.decode(ids[: middle + 1])
            first, last = (first, middle) if closed else (middle + 1, last)
        ends.append(first + 1)
    places = torch.arange(completions.shape[1], device=completions.device)
    return places < torch.tensor(ends, device=completions.device)[:, None]


def routed(seen: torch.Tensor, perception: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """The advantage of every token (B, T) under span-routed credit; `seen` (B, T), advantages (B,)."""
    return torch.where(seen, perception[:, None], outcome[:, None])


def reweighted(weight: float, seen: torch.Tensor, outcome: torch.Tensor, n_p: int, n: int) -> torch.Tensor:
    """The advantage of every token (B, T) under re-weighting by λ = `weight`, of `n_p` perception tokens among `n`."""
    return outcome[:, None] * torch.where(seen, weight * n / max(n_p, 1), (1 - weight) * n / max(n - n_p, 1))


def weight_of(arm: str) -> float | None:
    """λ of an arm `reweighted_<λ>`, None for any other."""
    match = re.fullmatch(CREDITS, arm)
    return float(match[1]) if match and match[1] else None


# ---- which way a policy gradient points ------------------------------------------------------------------------------


def policy_gradients(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rollouts: pd.DataFrame,
    data: Dataset,
    temperature: float,
    seed: int,
    label: str,
) -> pd.DataFrame:
    """∇ log π of every rollout, hashed to `SKETCH` numbers: what every policy gradient is a weighted sum of.

    Args:
        model: the checkpoint that wrote them; its weights that have gradients count (`models.as_trained`).
        rollouts: problem_id, rollout, completion, and `ended`: whether the end token was written.
        data: the split they come from: problem_id, query, image.
        temperature: of the sampling; the policy is the distribution that was sampled from.
        seed: of the hash. Under different seeds sketches are as good as orthogonal, and a sum over seeds keeps each.

    Returns:
        problem_id, rollout, `whole` (through all tokens) and `seen` (through the perception tokens, of which a response
        that never closes its perception has none here), arrays (SKETCH,).
        Inner products of sketches are those of the gradients, up to 1/√SKETCH of their norms.
    """
    parameters = [weights for weights in model.parameters() if weights.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    total = sum(weights.numel() for weights in parameters)
    bucket = torch.randint(SKETCH, (total,), generator=generator, dtype=torch.int32)
    sign = torch.randint(2, (total,), generator=generator, dtype=torch.int8) * 2 - 1

    def sketch(value: torch.Tensor) -> np.ndarray:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(q) if g is None else g for g, q in zip(found, parameters, strict=True)]
        flat = torch.cat([each.flatten().float().cpu() for each in flat])
        return torch.zeros(SKETCH).index_add_(0, bucket, flat * sign).numpy()

    collator, records = SegmentCollator(processor), []
    position = {name: index for index, name in enumerate(data["problem_id"])}
    with progress(label, len(rollouts)) as bar:
        for row in rollouts.itertuples():
            shown = data[position[row.problem_id]]
            batch = collator([{"query": shown["query"], "image": shown["image"], "response": row.completion}])
            if not row.ended:
                batch["labels"][0, -1] = -100  # the collator's end token was never written
            losses, segments = token_losses(model, batch, temperature)
            sketches = {"whole": sketch(-losses.sum()), "seen": sketch(-(losses * (segments == PERCEPTION)).sum())}
            records.append({"problem_id": row.problem_id, "rollout": row.rollout, **sketches})
            bar.update(1)
    return pd.DataFrame(records)


def gradient_table(gradients: pd.DataFrame, rewards: Sequence[str], resamples: int = 1000) -> pd.DataFrame:
    """How each reward's policy gradient lies to the gradient of perception, with intervals over problems.

    Args:
        gradients: of `policy_gradients`, with columns task, family, seed and one for each of `rewards`, of which one is
            "perception".

    Returns:
        task, family, reward, measure, estimate, low, high, n, seeds. Measures: `cosine`, of the two gradients summed
        over the same rollouts, whose noise they share (its interval by the jackknife); `signal_to_noise`, mean /
        standard deviation over the prompt groups of every other problem of the reward's gradient through the perception
        tokens, projected on the perception gradient of the problems in between. (Leaving out just the problem itself
        would not do, nor letting either half judge the other: projections would then share each other's noise.)
    """
    records = []
    for (task, family), part in gradients.groupby(["task", "family"]):
        part = part.assign(problem=stats.own_problems(part))
        groups = [group for _, group in part.groupby(["seed", "problem_id"])]
        where = pd.concat([group[["seed", "problem"]].head(1) for group in groups], ignore_index=True)
        ideal = _summed(groups, "perception", "seen")
        judge = where.groupby("seed").cumcount() % 2 == 0  # half of the problems give the direction, half are judged
        sums = {seed: ideal[judge & (where.seed == seed)].sum(0) for seed in where.seed.unique()}
        towards = np.stack([sums[seed] / max(np.linalg.norm(sums[seed]), 1e-30) for seed in where.seed])
        judged = where[~judge]
        for reward in rewards:
            both = np.concatenate([_summed(groups, reward, "whole"), ideal], 1)
            cosine = stats.jackknife(stats.cells(both, where.problem, where.seed), _cosine)
            along = (_summed(groups, reward, "seen") * towards).sum(1)[~judge]
            moments = np.stack([np.ones_like(along), along, along**2], 1)
            signal = stats.bootstrap(stats.cells(moments, judged.problem, judged.seed), _ratio, resamples)
            for measure, estimate in (("cosine", cosine), ("signal_to_noise", signal)):
                about = {"task": task, "family": family, "reward": reward, "measure": measure}
                records.append(about | vars(estimate))
    return pd.DataFrame(records)


def _summed(groups: Sequence[pd.DataFrame], reward: str, tokens: str) -> np.ndarray:
    """The policy gradient of every prompt group under a reward: Σ advantage · ∇ log π, (groups, SKETCH)."""
    advantages = [group_advantages(torch.tensor(group[reward].to_numpy(float)), len(group)).numpy() for group in groups]
    return np.stack([a @ np.stack(group[tokens]) for a, group in zip(advantages, groups, strict=True)])


def _cosine(sums: np.ndarray) -> np.ndarray:
    """Cosine of the two halves of the last axis; nan where one is zero."""
    one, other = np.split(sums, 2, axis=-1)
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Mean over standard deviation from summed (1, x, x²); nan where x does not vary."""
    mean, square = sums[..., 1] / sums[..., 0], sums[..., 2] / sums[..., 0]
    variance = square - mean**2
    return mean / np.sqrt(np.where(variance > 1e-12 * square, variance, np.nan))
