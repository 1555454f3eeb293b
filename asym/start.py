"""Which checkpoint RL starts from: an SFT arm, as long as a rule on validation problems says, or one of your own."""

from pathlib import Path

import pandas as pd

from asym import sft, stats
from asym.evaluate import measure_along
from asym.params import Params, ParamsError
from asym.runs import Run, repo_root

HALF_GOOD = (30, 70)  # % of responses: a start that is always right or always wrong leaves nothing to learn from
MALFORMED = 30  # % of responses at most, or RL would first of all teach the format


def train_start(p: Params, base: Run | None, task: str, seed: int) -> Run:
    """The checkpoint that every RL arm of a task starts from: an SFT arm from `base`, or `p.start_model`.

    Raises ParamsError if `p.start_model` is no checkpoint.
    """
    return Run.linked(repo_root(), own_start(p)) if p.start_model else _chosen_start(p, base, task, seed)


def own_start(p: Params) -> Path:
    """The folder that `p.start_model` names. Raises ParamsError if it holds no checkpoint."""
    folder = (repo_root() / Path(p.start_model).expanduser()).resolve()
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise ParamsError(f"start_model = {p.start_model!r}: must be the folder of a checkpoint with its config.json")
    return folder


def like_start(p: Params) -> Params:
    """The parameters of SFT arms with traces like those of the arm that RL starts from."""
    return p.model_copy(update={"verbosity": p.rl_start_verbosity, "variation": p.rl_start_variation})


def start_steps(p: Params) -> list[int]:
    """The lengths of SFT among which the start of RL is chosen: tenths of `p.sft_steps`, or `p.rl_start_steps`."""
    return [p.rl_start_steps] if p.rl_start_steps else sorted({-(-p.sft_steps * k // 10) for k in range(1, 11)})


def start_rule(rows: pd.DataFrame) -> pd.DataFrame:
    """How far checkpoints are from the rule for a start of RL, by their rows on the validation split.

    The rule: a_p and a_r within `HALF_GOOD`, and at most `MALFORMED` responses to the image that cannot be read.

    Returns:
        The columns of `stats.curves`, `malformed` (%) and `missed`: the points by which the three break the rule.
    """
    keys = ["task", "family", "arm", "seed", "step"]
    malformed = 100 * stats.select(rows, "parse_failure").groupby(keys).value.mean().rename("malformed")
    table = stats.curves(rows).merge(malformed.reset_index(), on=keys)
    low, high = HALF_GOOD
    missed = sum((low - table[half]).clip(lower=0) + (table[half] - high).clip(lower=0) for half in ("a_p", "a_r"))
    missed += (table.malformed - MALFORMED).clip(lower=0)
    return table.assign(missed=missed.round(6))  # 0, where rounding alone would break the rule


def _chosen_start(p: Params, base: Run, task: str, seed: int) -> Run:
    """The SFT arm after `p.rl_start_steps`; if they are 0, after the fewest tenths of `p.sft_steps` that keep the rule.

    If none does, the one that misses it least (`start_rule`). Each is a training of its own, to the end of its
    schedule: checkpoints on the way, at a high learning rate, see and reason as well but lose the thread more often.
    """
    p = like_start(p).model_copy(update={"curve_every": 0})
    if p.rl_start_steps:
        return sft.train_arm(p, base, task, p.rl_start_arm, seed, p.rl_start_steps)
    tried = []
    for steps in start_steps(p):
        run = sft.train_arm(p, base, task, p.rl_start_arm, seed, steps)
        missed = start_rule(measure_along(p, {steps: run}, task, "sft", p.rl_start_arm, seed)).missed.item()
        tried.append((missed, run))
        if not missed:
            break
    return min(tried, key=lambda each: each[0])[1]  # the first of several
