"""Offline screening: rollouts of one checkpoint, with every reward and surrogate, before any RL."""

import pandas as pd

from asym import models
from asym.coupling import screening
from asym.credit import policy_gradients
from asym.data import load_split, task_of
from asym.evaluate import MODES, measure, rows_run
from asym.params import Params
from asym.rewards import SURROGATES, with_surrogates
from asym.runs import Run, repo_root
from asym.self_rewards import SELF_REWARDS, Policy, with_self_rewards
from asym.training import threads

NAMES = [reward.__name__ for reward in (*SURROGATES, *SELF_REWARDS)]
GRADIENTS = ["perception", "perception_graded", "mixed", "outcome", *NAMES]  # whose policy gradients are compared
KEYS = ["mode", "problem_id", "rollout"]


def scored_rollouts(
    p: Params,
    start: Run,
    task: str,
    seed: int,
    arm: str = "start",
    split: str = "train_rl",
    modes: tuple[str, ...] = MODES,
) -> pd.DataFrame:
    """Rollouts of a checkpoint on problems of a split (as `evaluate.measure` returns them), each with all surrogates.

    Counterfactual rollouts, if asked for, are among the rows, their surrogates nan. From the run's cache where they
    exist.
    """
    rows = measure(p, start, task, "rl", arm, seed, split=split, rollouts=p.coupling_rollouts, modes=modes)

    def scores() -> pd.DataFrame:
        own, data = rows[rows["mode"] == "end_to_end"], load_split(p, task, split, seed)
        policy = Policy(*models.load(start.checkpoint, p, merge=False), p.max_new_tokens, p.eval_batch)
        with threads(p.threads):
            found = with_self_rewards(task_of(p, task), with_surrogates(task_of(p, task), own), data, policy)
        return found[[*KEYS, *NAMES]]

    about = {"rows": rows_run(p, start, task, seed, split, p.coupling_rollouts, modes).folder.name}
    scored = Run.open(repo_root(), f"rl-screen-{task}", about).table(scores)
    return rows.merge(scored, how="left", on=KEYS, validate="one_to_one")


def reward_gradients(p: Params, start: Run, task: str, seed: int) -> pd.DataFrame:
    """`credit.policy_gradients` of the rollouts of the first `p.n_gradient` problems, beside the rewards `GRADIENTS`.

    "mixed" is what an arm of α = ½ is paid.
    """
    scored = scored_rollouts(p, start, task, seed)
    own = scored[(scored["mode"] == "end_to_end") & scored.problem_id.isin(scored.problem_id.unique()[: p.n_gradient])]

    def gradients() -> pd.DataFrame:
        with threads(p.threads):
            asked = own.assign(ended=own.n_tokens < p.max_new_tokens), load_split(p, task, "train_rl", seed)
            model, processor = models.load(start.checkpoint, p)
            model.eval()
            model = models.as_trained(model, p, seed)
            return policy_gradients(model, processor, *asked, p.rl_temperature, seed, f"gradients {task}")

    about = {"rows": rows_run(p, start, task, seed, "train_rl", p.coupling_rollouts).folder.name}
    about |= {"n_gradient": p.n_gradient, "trained_parts": p.trained_parts, "lora_rank": p.lora_rank}
    found = Run.open(repo_root(), f"rl-gradients-{task}", about).table(gradients)
    paid = {"a": "outcome", "a_p": "perception", "a_p_graded": "perception_graded"}
    own = own.rename(columns=paid).assign(mixed=(own.a + own.a_p) / 2)
    return found.merge(own, on=["problem_id", "rollout"], validate="one_to_one")


def screen(p: Params, start: Run, task: str) -> pd.DataFrame:
    """`coupling.screening` of a checkpoint at the first seed."""
    own = scored_rollouts(p, start, task, p.seeds[0], modes=MODES[:1])
    return screening(own, NAMES, p.bootstrap, p.surrogate_alpha)
