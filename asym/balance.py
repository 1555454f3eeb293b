"""How perception and reasoning are weighed: the λ of L = λ·L_p + (1 − λ)·L_r.

L_p and L_r are means over their own tokens, so λ alone says what each segment weighs (arXiv 2605.29496).
"""

import re
from dataclasses import dataclass
from math import nan
from typing import ClassVar, Protocol

import torch
from torchjd.aggregation import PCGradWeighting

from asym.params import WEIGHT


@dataclass(frozen=True)
class Segments:
    """One optimizer step seen by segment: token counts, and the gradient norms where they were measured.

    Attributes:
        n_p, n_r: perception and reasoning tokens of the accumulated batch.
        progress: share of the training's steps that are done, 0 to 1.
        norm_p, norm_r, cosine: norms of the accumulated gradients of L_p and L_r, and the cosine of their angle.
        loss_p, loss_r: L_p and L_r of the accumulated batch. These five are nan when not measured.
    """

    n_p: int
    n_r: int
    progress: float = 0.0
    norm_p: float = nan
    norm_r: float = nan
    cosine: float = nan
    loss_p: float = nan
    loss_r: float = nan


class Balance(Protocol):
    """A policy for λ. One that `needs_gradients` is asked with norms, cosine and losses filled in."""

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


class Uncertainty:
    """λ = L_r / (L_p + L_r): each loss is divided by itself; the step goes along the gradient of log L_p + log L_r.

    Uncertainty weighting (Kendall et al., arXiv 1705.07115) learns a variance σ² per loss, L/σ² + log σ²; here every σ²
    is at its optimum for the current batch, σ² = L, and nothing has to be learned or resumed.
    """

    needs_gradients = True

    def weight(self, step: Segments) -> float:
        total = step.loss_p + step.loss_r
        return step.loss_r / total if total > 0 else 0.5


class PCGrad:
    """Gradients that conflict are projected onto each other's normal plane before they are added (arXiv 2001.06782).

    With two gradients the sum is again a weighted one, w_p·g_p + w_r·g_r, so λ = w_p / (w_p + w_r); without conflict it
    is ½. The length w_p + w_r of the step is left to the learning rate, as for every other policy.
    """

    needs_gradients = True

    def weight(self, step: Segments) -> float:
        product = step.cosine * step.norm_p * step.norm_r
        weight_p, weight_r = PCGradWeighting()(
            torch.tensor([[step.norm_p**2, product], [product, step.norm_r**2]], dtype=torch.float64)
        ).tolist()
        return weight_p / (weight_p + weight_r)


@dataclass(frozen=True)
class PerceptionFirst:
    """A curriculum of two stages: perception alone for the share `first` of all steps, then every token the same.

    The learning rate warms up and decays in each of them, as in two trainings one after the other.
    """

    first: float = 0.5
    needs_gradients: ClassVar[bool] = False

    @classmethod
    def at_equal_tokens(cls, steps: int, share: float) -> tuple["PerceptionFirst", int]:
        """The curriculum that learns from as many tokens as `steps` steps on whole responses, and its own steps.

        Half as many steps go to perception, which is the `share` of a response's tokens; what that leaves of the tokens
        goes to whole responses.
        """
        alone = steps // 2
        total = steps + alone - round(alone * share)
        return cls(alone / total), total

    def weight(self, step: Segments) -> float:
        return 1.0 if step.progress < self.first else TokenAveraged().weight(step)


BALANCES = {
    "token_averaged": TokenAveraged,
    "ngdiff": NGDiff,
    "uncertainty": Uncertainty,
    "pcgrad": PCGrad,
    "perception_first": PerceptionFirst,
}


def balance_of(arm: str) -> Balance:
    """The policy of an SFT arm: one of `BALANCES` or `lambda_<number>`. Raises ValueError on any other."""
    if arm in BALANCES:
        return BALANCES[arm]()
    kind, _, value = arm.partition("_")
    if kind == "lambda" and re.fullmatch(WEIGHT, value):
        return Fixed(float(value))
    raise ValueError(f"unknown SFT arm {arm!r}: allowed are {', '.join(BALANCES)}, lambda_<0..1>")
