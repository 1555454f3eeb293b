"""a, a_p, a_r: one row per response, with problem and text, so that anyone can score it again."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict

import pandas as pd

from asym import models
from asym.data import drawn_by, load_split, task_of
from asym.decode import complete
from asym.params import Params
from asym.runs import Run, repo_root
from asym.scoring import score
from asym.training import threads
from asym.transcript import TAGS, prefill

MODES = ("end_to_end", "counterfactual")  # the image alone; the image, and the response begun with the true p*


def measure(
    p: Params,
    trained: Run,
    task: str,
    stage: str,
    arm: str,
    seed: int,
    *,
    split: str = "test",
    rollouts: int = 1,
    modes: tuple[str, ...] = MODES,
) -> pd.DataFrame:
    """Responses of a trained run to a split and all their scores, from the run's cache where they exist.

    Args:
        split: `test` to report; `validation` to choose; `train_rl` to study rewards.
        rollouts: per problem and mode; 1 decodes greedily, more are sampled at `rl_temperature`. Where there are
            several, and of `train_rl`, only the first `n_coupling` problems are used.
        modes: the first alone, where a_r is not asked for, or both.

    Returns:
        Columns task, family, stage, arm, seed, mode, problem_id, rollout, ground_truth, completion, a, a_p, a_p_graded,
        a_own, parse_failure, n_tokens. a_r is the mean of `a` where mode is "counterfactual".
    """
    run = rows_run(p, trained, task, seed, split, rollouts, modes)
    about = {"task": task, "family": p.family, "stage": stage, "arm": arm, "seed": seed}
    with threads(p.threads):
        rows = run.table(lambda: responses(p, trained, task, seed, split, rollouts, modes))
    return rows.assign(**about)[[*about, *COLUMNS]]


def rows_run(
    p: Params, trained: Run, task: str, seed: int, split: str, rollouts: int, modes: tuple[str, ...] = MODES
) -> Run:
    """The run that holds what `measure` returns, whatever the checkpoint is called: a start is an SFT arm, too.

    `eval_batch`, what fits into memory, is no part of its name, nor of an RL arm's: it moves rounding and which random
    numbers a rollout meets, and whoever must lower it keeps what is finished.
    """
    keys = [f"n_{split}", "max_new_tokens", "dtype", "attention"]
    keys += ["n_coupling"] * _of_the_first(split, rollouts) + ["rl_temperature"] * (rollouts > 1)
    config = {key: getattr(p, key) for key in keys} | drawn_by(p, task)
    config |= {"trained": trained.folder.name, "task": task, "split": split, "rollouts": rollouts}
    if rollouts > 1 or split.startswith("train"):  # else the seed, if the checkpoint has several, makes no difference
        config["seed"] = seed
    if modes != MODES:
        config["modes"] = modes
    return Run.open(repo_root(), f"rows-{task}", config)


def _of_the_first(split: str, rollouts: int) -> bool:
    """Whether only the first `n_coupling` problems of a split are used."""
    return split == "train_rl" or rollouts > 1


def measure_along(p: Params, runs: Mapping[int, Run], task: str, stage: str, arm: str, seed: int) -> pd.DataFrame:
    """`measure` on the validation split of the runs of one training, by step; the rows say at which `step`."""
    rows = [measure(p, run, task, stage, arm, seed, split="validation").assign(step=k) for k, run in runs.items()]
    return pd.concat(rows, ignore_index=True)


COLUMNS = ["mode", "problem_id", "rollout", "ground_truth", "completion"]
COLUMNS += ["a", "a_p", "a_p_graded", "a_own", "parse_failure", "n_tokens"]


def responses(
    p: Params, trained: Run, name: str, seed: int, split: str, rollouts: int, modes: tuple[str, ...] = MODES
) -> pd.DataFrame:
    """What `measure` returns of a run, computed now, without what it is about: the columns `COLUMNS`.

    `p.max_new_tokens` limits what the model writes. A true perception that it is given does not count towards it.
    """
    model, processor = models.load(trained.checkpoint, p, merge=False)
    task, data = task_of(p, name), load_split(p, name, split, seed)
    if _of_the_first(split, rollouts):
        data = data.select(range(min(p.n_coupling, len(data))))
    columns = ("query", "image", "perception", "problem_id", "ground_truth")
    queries, images, perceptions, ids, truths = (data[column][:] for column in columns)
    rows, own = [], [""] * len(data)
    for mode in modes:
        starts = [prefill(text) if mode == "counterfactual" else "" for text in perceptions]
        # A greedy response that saw right did begin with the true p*: it is its own counterfactual (but for a tie
        # between two tokens, and for an end tag that used up the last token allowed)
        texts = {}
        if rollouts == 1:  # in the first mode there are no own responses yet
            whole = [
                text.endswith(TAGS[-1]) and text.startswith(s + TAGS[2]) for text, s in zip(own, starts, strict=True)
            ]
            texts = {i: [text] for i, text in enumerate(own) if whole[i]}
        left = [i for i in range(len(data)) if i not in texts]
        completions = complete(
            model,
            processor,
            [queries[i] for i in left],
            [images[i] for i in left],
            [starts[i] for i in left],
            max_new_tokens=p.max_new_tokens,
            batch=p.eval_batch,
            copies=rollouts,
            temperature=p.rl_temperature if rollouts > 1 else 0.0,
            seed=seed,
            label=f"{name} {mode.replace('_', '-')}",
        )
        texts |= {i: completions[k * rollouts : (k + 1) * rollouts] for k, i in enumerate(left)}
        own = [texts[i][0] for i in range(len(data))]
        for i, rollout in itertools.product(range(len(data)), range(rollouts)):
            row = {"mode": mode, "problem_id": ids[i], "rollout": rollout, "ground_truth": truths[i]}
            row["completion"] = texts[i][rollout]
            row["n_tokens"] = len(processor.tokenizer(row["completion"])["input_ids"])
            rows.append(row | asdict(score(task, task.problem(truths[i]), row["completion"])))
    return pd.DataFrame(rows)[COLUMNS]
