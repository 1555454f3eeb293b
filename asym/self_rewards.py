"""Surrogates that ask the model itself: label-free perception rewards that take another pass of the policy.

Beside what every reward takes (`rewards.py`) they take what the policy was shown and the policy; they return one number
in [0, 1] per response, 0 where its perception cannot be read. Neither draws a random number: asking changes no rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from asym.decode import complete
from asym.scoring import read, score
from asym.sft import SegmentCollator, token_losses
from asym.tasks import Task
from asym.transcript import PERCEPTION, prefill, split


@dataclass(frozen=True)
class Policy:
    """The model that wrote the responses, as it is now, and the limits under which it writes."""

    model: PreTrainedModel
    processor: ProcessorMixin
    max_new_tokens: int
    batch: int


def self_blindfold(
    task: Task, problems: Sequence, completions: Sequence[str], queries: Sequence[str], images: Sequence, policy: Policy
) -> list[float]:
    """The model, shown its own perception and no image, answers correctly (Vision-SR1, arXiv 2508.19652).

    It gets the same question without the image and a response begun with that perception, and goes on greedily.
    """
    begun = [_begun(task, problem, text) for problem, text in zip(problems, completions, strict=True)]
    asked = [ask for ask in dict.fromkeys(zip(queries, begun, strict=True)) if ask[1]]  # the same perception once
    texts = complete(
        policy.model,
        policy.processor,
        [query for query, _ in asked],
        [None] * len(asked),
        [start for _, start in asked],
        max_new_tokens=policy.max_new_tokens,
        batch=policy.batch,
        label="self-blindfold",
    )
    answered = dict(zip(asked, texts, strict=True))
    answers = [answered.get(ask, "") for ask in zip(queries, begun, strict=True)]
    return [score(task, problem, text).a for problem, text in zip(problems, answers, strict=True)]


def image_dependence(
    task: Task, problems: Sequence, completions: Sequence[str], queries: Sequence[str], images: Sequence, policy: Policy
) -> list[float]:
    """How much likelihood the perception loses when the image is blanked (after PAPO, arXiv 2507.06448).

    1 − exp(−r), at least 0, for the mean log-ratio r of the perception tokens' likelihood with the image and with a
    grey one: the share of the likelihood per token that the image accounts for. PAPO maximises a divergence of this
    kind over all tokens, with part of the patches masked.
    """
    begun = [_begun(task, problem, text) for problem, text in zip(problems, completions, strict=True)]
    rows, rewards = [i for i, start in enumerate(begun) if start], [0.0] * len(begun)
    for some in (rows[k : k + policy.batch] for k in range(0, len(rows), policy.batch)):
        seeing = [{"query": queries[i], "response": begun[i], "image": images[i]} for i in some]
        blind = [row | {"image": Image.new("RGB", row["image"].size, "grey")} for row in seeing]
        ratio = perception_likelihood(policy, seeing) - perception_likelihood(policy, blind)
        for i, value in zip(some, (1 - (-ratio).exp()).clamp(min=0).tolist(), strict=True):
            rewards[i] = value
    return rewards


def _begun(task: Task, problem: Any, completion: str) -> str:
    """A response up to the end of its perception; "" if that cannot be read."""
    return "" if read(task, problem, completion)[0] is None else prefill(split(completion).perception)


@torch.no_grad()
def perception_likelihood(policy: Policy, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Mean log-likelihood of the perception tokens of each row (query, image, response): (B,), nats."""
    losses, segments = token_losses(policy.model, SegmentCollator(policy.processor)(rows))
    seen = segments == PERCEPTION
    return (-(losses * seen).sum(1) / seen.sum(1)).cpu()


SELF_REWARDS = (self_blindfold, image_dependence)


def with_self_rewards(task: Task, rollouts: pd.DataFrame, data: Dataset, policy: Policy) -> pd.DataFrame:
    """Rollouts of one task and policy with a column for each of `SELF_REWARDS`.

    Args:
        rollouts: columns problem_id, ground_truth, completion.
        data: the split they come from: columns problem_id, query, image.
    """
    place = {name: index for index, name in enumerate(data["problem_id"])}
    shown = data.select([place[name] for name in rollouts.problem_id])
    problems, completions = [task.problem(truth) for truth in rollouts.ground_truth], list(rollouts.completion)
    asked = (task, problems, completions, shown["query"][:], shown["image"][:], policy)
    return rollouts.assign(**{reward.__name__: reward(*asked) for reward in SELF_REWARDS})
