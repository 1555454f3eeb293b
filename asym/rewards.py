"""Rewards: pure functions of the problems and the responses, each logged in a column of its own.

Every reward takes the task, one problem per response, and the responses, and returns one number in [0, 1] per response.
The first four need the ground truth of perception or answer; the rest are *surrogates* for the perception reward that
need no perception labels. Two more surrogates ask the model itself: `self_rewards.py`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, get_args

import pandas as pd

from asym.params import CREDITS, WEIGHT, Surrogate
from asym.scoring import read, score
from asym.tasks import Task

Reward = Callable[[Task, Sequence[Any], Sequence[str]], list[float]]


def outcome(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """a: the answer solves the problem."""
    return [score(task, problem, text).a for problem, text in zip(problems, completions, strict=True)]


def perception(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """a_p: the perception equals p*."""
    return [score(task, problem, text).a_p for problem, text in zip(problems, completions, strict=True)]


def perception_graded(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Graded a_p: share of cells, F1 over edges."""
    return [score(task, problem, text).a_p_graded for problem, text in zip(problems, completions, strict=True)]


def format(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The response can be read."""
    return [float(not read(task, problem, text)[2]) for problem, text in zip(problems, completions, strict=True)]


def solver_blindfold(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """An exact solver answers from the perception alone; the outcome verifier judges its answer.

    After the self-blindfold of Vision-SR1 (arXiv 2508.19652), with a solver in the place of the model. Judged by the
    problem's verifier, not by p*: wrong perceptions whose solution happens to fit are rewarded too.
    """
    rewards = []
    for problem, text in zip(problems, completions, strict=True):
        seen = read(task, problem, text)[0]
        answer = None if seen is None else task.solve(seen)
        rewards.append(float(answer is not None and task.solves(answer, problem)))
    return rewards


def validity(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The perception could be a problem of this task: no clash and one solution; a simple graph."""
    rewards = []
    for problem, text in zip(problems, completions, strict=True):
        seen = read(task, problem, text)[0]
        rewards.append(float(seen is not None and task.valid(seen)))
    return rewards


def group_agreement(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """Mean similarity of the perception to those of the other rollouts of the same problem (self-consistency)."""
    seen = [read(task, problem, text)[0] for problem, text in zip(problems, completions, strict=True)]
    groups = defaultdict(list)
    for index, problem in enumerate(problems):
        groups[problem].append(index)
    rewards = []
    for index, problem in enumerate(problems):
        others = [seen[other] for other in groups[problem] if other != index]
        similar = [0.0 if None in (seen[index], s) else task.similarity(seen[index], s) for s in others]
        rewards.append(fmean(similar) if similar else 0.0)
    return rewards


def answer_consistency(task: Task, problems: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """The answer solves what the response says it sees: a negative control, it rewards reasoning."""
    return [score(task, problem, text).a_own for problem, text in zip(problems, completions, strict=True)]


LABELLED: tuple[Reward, ...] = (outcome, perception, perception_graded, format)
SURROGATES: tuple[Reward, ...] = (solver_blindfold, validity, group_agreement, answer_consistency)


def with_surrogates(task: Task, rollouts: pd.DataFrame) -> pd.DataFrame:
    """Rollouts of one task (columns ground_truth, completion) with a column for each surrogate, named after it."""
    problems = [task.problem(truth) for truth in rollouts.ground_truth]
    return rollouts.assign(**{each.__name__: each(task, problems, list(rollouts.completion)) for each in SURROGATES})


def weights_of(arm: str, surrogate_alpha: float) -> dict[str, float]:
    """What an RL arm is paid, R = α·r + (1 − α)·a, as reward name → weight; all others are logged at weight 0.

    Arms: `outcome`; `alpha_<α>` and `graded_<α>` with exact and graded perception; the surrogates; `reweighted_<λ>`,
    paid the outcome; `span_routed`, where either reward is paid in full, to its own tokens, and `routed_perception`,
    where other tokens are paid nothing (`credit.py`).
    Raises ValueError on any other.
    """
    if arm == "span_routed":
        return {"perception": 1.0, "outcome": 1.0}
    if arm == "routed_perception":
        return {"perception": 1.0}
    if arm == "outcome" or re.fullmatch(CREDITS, arm):
        return {"outcome": 1.0}
    if match := re.fullmatch(rf"(alpha|graded)_{WEIGHT}", arm):
        alpha = float(match[2])
        return {"perception" if match[1] == "alpha" else "perception_graded": alpha, "outcome": 1 - alpha}
    if arm in get_args(Surrogate):
        return {arm: surrogate_alpha, "outcome": 1 - surrogate_alpha}
    raise ValueError(f"unknown RL arm {arm!r}")
