"""Offline screening: rollouts of one checkpoint, with every reward and surrogate, before any RL."""

import pandas as pd

from asym import models
from asym.coupling import screening
from asym.credit import policy_gradients
from asym.data import load_split, task_of
from asym.evaluate import measure
from asym.params import Params
from asym.rewards import SURROGATES, with_surrogates
from asym.runs import Run, repo_root, write_parquet
from asym.self_rewards import SELF_REWARDS, Policy, with_self_rewards
from asym.sft import threads

NAMES = [reward.__name__ for reward in (*SURROGATES, *SELF_REWARDS)]
GRADIENTS = ["perception", "outcome", *NAMES]  # rewards whose policy gradients are compared


def scored_rollouts(p: Params, start: Run, task: str, seed: int) -> pd.DataFrame:
    """Rollouts of a checkpoint on RL training problems (as `evaluate.measure` returns them), each with all surrogates.

    Counterfactual rollouts are among the rows, their surrogates nan. From the run's cache where they exist.
    """
    rows = measure(p, start, task, "rl", "start", seed, split="train_rl", rollouts=p.coupling_rollouts)
    keys = ("max_new_tokens", "eval_batch", "n_train_rl", "n_coupling", "coupling_rollouts", "rl_temperature")
    config = {key: getattr(p, key) for key in keys} | {"start": start.folder.name, "task": task, "seed": seed}
    run = Run.open(repo_root(), f"rl-screen-{task}", config)
    path = run.folder / "rewards.parquet"
    with run.locked():
        if not run.done:
            own = rows[rows["mode"] == "end_to_end"]
            policy = Policy(*models.load(start.checkpoint), p.max_new_tokens, p.eval_batch)
            with threads(p.threads):
                found = with_surrogates(task_of(p, task), own)
                found = with_self_rewards(task_of(p, task), found, load_split(p, task, "train_rl", seed), policy)
            write_parquet(path, found[["mode", "problem_id", "rollout", *NAMES]])
            run.finish()
    return rows.merge(pd.read_parquet(path), how="left", on=["mode", "problem_id", "rollout"], validate="one_to_one")


def reward_gradients(p: Params, start: Run, task: str, seed: int) -> pd.DataFrame:
    """`credit.policy_gradients` of the first `p.n_gradient` problems of `scored_rollouts`; adds task, family, seed."""
    scored = scored_rollouts(p, start, task, seed)
    own = scored[scored["mode"] == "end_to_end"].rename(columns={"a": "outcome", "a_p": "perception"})
    own = own[own.problem_id.isin(own.problem_id.unique()[: p.n_gradient])]
    keys = ("n_gradient", "max_new_tokens", "n_train_rl", "coupling_rollouts", "rl_temperature", "trained_parts")
    config = {key: getattr(p, key) for key in keys} | {"start": start.folder.name, "task": task, "seed": seed}
    run = Run.open(repo_root(), f"rl-gradients-{task}", config)
    path = run.folder / "gradients.parquet"
    with run.locked():
        if not run.done:
            data = load_split(p, task, "train_rl", seed)
            with threads(p.threads):
                model, processor = models.load(start.checkpoint)
                asked = (model, processor, own, data, GRADIENTS, p.trained_parts, seed, f"gradients {task}")
                write_parquet(path, policy_gradients(*asked))
            run.finish()
    return pd.read_parquet(path).assign(task=task, family=p.family, seed=seed)


def screen(p: Params, start: Run, task: str) -> pd.DataFrame:
    """`coupling.screening` of a checkpoint at the first seed."""
    scored = scored_rollouts(p, start, task, p.seeds[0])
    return screening(scored[scored["mode"] == "end_to_end"], NAMES, p.bootstrap)
