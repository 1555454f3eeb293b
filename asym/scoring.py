"""Every score of one response, from the problem and the text alone: no model, no stored solution, no exception."""

from dataclasses import dataclass, replace
from typing import Any

from asym.tasks import Task
from asym.transcript import split


@dataclass(frozen=True)
class Score:
    """What one response is worth.

    A malformed response scores 0, but for its perception where it begins with one that can be read: a model that saw
    right and then reasons without an end has failed to reason, not to see.

    Attributes:
        a: the answer solves the problem (1.0 or 0.0).
        a_p: the perception equals p* (1.0 or 0.0).
        a_p_graded: agreement with p* in [0, 1]: share of cells, F1 over edges.
        a_own: the answer solves the problem the response itself states (1.0 or 0.0).
        parse_failure: why the response is malformed, "" when it is not.
    """

    a: float = 0.0
    a_p: float = 0.0
    a_p_graded: float = 0.0
    a_own: float = 0.0
    parse_failure: str = ""


def read(task: Task, problem: Any, completion: str) -> tuple[Any, Any, str]:
    """What a response sees and answers, None where that cannot be read, and why it is malformed ("" when it is not)."""
    response = split(completion)
    try:
        seen = task.parse_perception(response.perception, problem)
    except ValueError as error:
        return None, None, response.failure or f"perception: {error}"
    if response.failure:
        return seen, None, response.failure
    try:
        return seen, task.parse_answer(response.answer, problem), ""
    except ValueError as error:
        return seen, None, f"answer: {error}"


def score(task: Task, problem: Any, completion: str) -> Score:
    """Score a completion; never raises on any text."""
    seen, answer, failure = read(task, problem, completion)
    result = Score(parse_failure=failure)
    if seen is not None:
        result = replace(result, a_p=float(seen == problem), a_p_graded=task.similarity(seen, problem))
    if not failure:
        result = replace(result, a=float(task.solves(answer, problem)), a_own=float(task.solves(answer, seen)))
    return result
