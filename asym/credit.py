"""Which tokens get the credit of a reward, and which way its policy gradient points.

*Credit*: GRPO gives every token of a rollout the same advantage. Here perception tokens may get another one:

- `span_routed` [ours]: perception tokens get the group-relative advantage of exact perception, the others that of the
  outcome.
- `reweighted_<λ>`: all get the outcome's, but the loss is λ·(mean over perception tokens) + (1 − λ)·(mean over the
  others), as SFT weighs them; as an advantage per token that is A·λ·N/n_p and A·(1 − λ)·N/n_r of N = n_p + n_r tokens.

*Gradients*: ∇ Σ A·log π of the rollouts of one checkpoint, for several rewards, beside the gradient of the perception
itself: that of exact perception through the perception tokens, all that a_p depends on.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from asym import models, stats
from asym.params import CREDITS
from asym.runs import progress
from asym.sft import SegmentCollator
from asym.transcript import PERCEPTION

SKETCH = 4096  # dimensions a gradient is hashed to: inner products then err by 1/64 of the norms


def group_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """(r − mean) / (std + 1e-4) within each prompt's `group` consecutive rollouts, as TRL's: (B,) → (B,)."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def perception_mask(tokenizer, completions: torch.Tensor) -> torch.Tensor:
    """Which tokens (B, T) lie before the end of the perception span; none in a row that never closes it.

    The token that completes `</perception>` is found by bisection, so that any tokenizer will do.
    """
    ends = []
    for ids in completions.tolist():
        first, last = 0, len(ids)
        while first < last:
            middle = (first + last) // 2
            closed = "</perception>" in tokenizer.decode(ids[: middle + 1])
            first, last = (first, middle) if closed else (middle + 1, last)
        ends.append(first + 1 if first < len(ids) else 0)
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
    rewards: Sequence[str],
    parts: Sequence[str],
    seed: int,
    label: str,
) -> pd.DataFrame:
    """The policy gradient of every prompt group under each reward, hashed to `SKETCH` numbers.

    Args:
        rollouts: of one checkpoint, several per problem: problem_id, completion and a column for each of `rewards`.
            A completion that was cut off counts as ended.
        data: the split they come from: problem_id, query, image.
        parts: the parts of the model that RL trains; only their weights count.
        seed: of the hash. Under different seeds sketches are as good as orthogonal, and a sum over seeds keeps each.

    Returns:
        One row per problem and reward: problem_id, reward, `whole` (all tokens) and `seen` (perception tokens alone),
        arrays (SKETCH,). Inner products of sketches are those of the gradients, up to 1/√SKETCH of their norms.
    """
    for name, weights in model.named_parameters():
        weights.requires_grad = models.part_of(name) in parts
    parameters = [weights for weights in model.parameters() if weights.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    total = sum(weights.numel() for weights in parameters)
    place = torch.randint(SKETCH, (total,), generator=generator)
    sign = torch.randint(2, (total,), generator=generator).float() * 2 - 1

    def sketch(sums: torch.Tensor, advantages: torch.Tensor) -> np.ndarray:
        found = torch.autograd.grad(sums, parameters, advantages, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(q) if g is None else g for g, q in zip(found, parameters, strict=True)]
        flat = torch.cat([each.flatten() for each in flat]).cpu()
        return torch.zeros(SKETCH).index_add_(0, place, flat * sign).numpy()

    collator, records = SegmentCollator(processor), []
    position = {name: index for index, name in enumerate(data["problem_id"])}
    model.eval()
    with progress(label, rollouts.problem_id.nunique()) as bar:
        for problem, group in rollouts.groupby("problem_id", sort=False):
            shown = data[position[problem]]
            rows = [{"query": shown["query"], "image": shown["image"], "response": text} for text in group.completion]
            whole, seen = _log_likelihoods(model, collator(rows))
            for reward in rewards:
                advantages = group_advantages(torch.tensor(group[reward].to_numpy(float)), len(group)).float()
                sketches = {"whole": sketch(whole, advantages), "seen": sketch(seen, advantages)}
                records.append({"problem_id": problem, "reward": reward, **sketches})
            bar.update(1)
    return pd.DataFrame(records)


def _log_likelihoods(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-likelihood of all response tokens and of the perception tokens of each row: (B,), (B,)."""
    segments, labels = batch.pop("segments")[:, 1:], batch.pop("labels")[:, 1:]
    given = {name: values.to(model.device) for name, values in batch.items()}
    logits = model(**given, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), labels.to(logits.device), reduction="none")
    return -losses.sum(1), -(losses * (segments == PERCEPTION).to(losses.device)).sum(1)


def gradient_table(gradients: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """How each reward's policy gradient lies to the gradient of perception, with intervals over problems.

    Args:
        gradients: of `policy_gradients`, with columns task, family, seed; one of the rewards is "perception".

    Returns:
        task, family, reward, measure, estimate, low, high, n, seeds. Measures: `cosine`, of the two gradients summed
        over all problems; `signal_to_noise`, mean / standard deviation over prompt groups of the reward's gradient
        through the perception tokens, projected on the perception gradient of all *other* problems: a step of k
        prompts moves perception the right way where √k times it is well above 0.
    """
    records = []
    for (task, family), part in gradients.groupby(["task", "family"]):
        target = part[part.reward == "perception"].sort_values(["seed", "problem_id"])
        ideal = np.stack(target.seen)
        for reward, group in part.groupby("reward", sort=False):
            group = group.sort_values(["seed", "problem_id"])
            about = {"task": task, "family": family, "reward": reward}
            both = np.concatenate([np.stack(group.whole), ideal], 1)
            totals = stats.cells(both, group.problem_id, group.seed)
            cosine = stats.bootstrap(totals, _cosine, resamples)
            seen, others = np.stack(group.seen), _sum_of_others(ideal, group.seed.to_numpy())
            along = (seen * others).sum(1) / np.maximum(np.linalg.norm(others, axis=1), 1e-30)
            moments = np.stack([np.ones_like(along), along, along**2], 1)
            signal = stats.bootstrap(stats.cells(moments, group.problem_id, group.seed), _ratio, resamples)
            for measure, estimate in (("cosine", cosine), ("signal_to_noise", signal)):
                records.append(about | {"measure": measure} | vars(estimate))
    return pd.DataFrame(records)


def _cosine(sums: np.ndarray) -> np.ndarray:
    """Cosine of the two halves of the last axis; nan where one is zero."""
    one, other = np.split(sums, 2, axis=-1)
    return (one * other).sum(-1) / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Mean over standard deviation from summed (1, x, x²); nan where x does not vary."""
    mean, square = sums[..., 1] / sums[..., 0], sums[..., 2] / sums[..., 0]
    variance = square - mean**2
    return mean / np.sqrt(np.where(variance > 1e-12 * square, variance, np.nan))


def _sum_of_others(rows: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """For every row the sum of the other rows of its seed: (N, D) → (N, D)."""
    totals = {seed: rows[seeds == seed].sum(0) for seed in np.unique(seeds)}
    return np.stack([totals[seed] for seed in seeds]) - rows
