"""How perception and reasoning are weighed: the λ of L = λ·L_p + (1 − λ)·L_r.

L_p and L_r are means over their own tokens, so λ alone says what each segment weighs (arXiv 2605.29496).
"""

import re
from dataclasses import dataclass
from math import nan
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Segments:
    """One optimizer step seen by segment: token counts, and the gradient norms where they were measured.

    Attributes:
        n_p, n_r: perception and reasoning tokens of the accumulated batch.
        norm_p, norm_r: norms of the accumulated gradients of L_p and L_r; nan when not measured.
    """

    n_p: int
    n_r: int
    norm_p: float = nan
    norm_r: float = nan


class Balance(Protocol):
    """A policy for λ. One that `needs_gradients` is asked with the norms filled in."""

    needs_gradients: ClassVar[bool]

    def weight(self, step: Segments) -> float:
        """λ in [0, 1] for this step."""


class TokenAveraged:
    """λ = n_p / (n_p + n_r): every token weighs the same, as in every trainer."""

    needs_gradients = False

    def weight(self, step: Segments) -> float:
        return step.n_p / max(step.n_p + step.n_r, 1)


@dataclass(frozen=True)
class Fixed:
    """The same λ at every step."""

    value: float
    needs_gradients: ClassVar[bool] = False

    def weight(self, step: Segments) -> float:
        return self.value


class NGDiff:
    """λ = ‖g_r‖ / (‖g_p‖ + ‖g_r‖): the step goes along g_p/‖g_p‖ + g_r/‖g_r‖, to first order harmless to either loss.

    Normalised gradient difference was made for unlearning, where one loss goes up (Bu et al., arXiv 2410.22086); here
    both go down. "Harmless" is said of plain gradient descent; under AdamW, which rescales every coordinate, it is a
    heuristic.
    """

    needs_gradients = True

    def weight(self, step: Segments) -> float:
        total = step.norm_p + step.norm_r
        return step.norm_r / total if total > 0 else 0.5


def balance_of(arm: str) -> Balance:
    """The policy of an SFT arm: `token_averaged`, `lambda_<number>` or `ngdiff`. Raises ValueError on any other."""
    if arm == "token_averaged":
        return TokenAveraged()
    if arm == "ngdiff":
        return NGDiff()
    kind, _, value = arm.partition("_")
    if kind == "lambda" and re.fullmatch(r"[01]|0\.\d+", value):
        return Fixed(float(value))
    raise ValueError(f"unknown SFT arm {arm!r}: allowed are token_averaged, lambda_<0..1>, ngdiff")
