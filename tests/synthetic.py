"""Rows as an evaluation writes them, drawn from known rates of perception and reasoning."""

import numpy as np
import pandas as pd


def responses(
    rates: dict[str, tuple[float, float]],
    problems: int = 200,
    seeds: tuple[int, ...] = (0,),
    rollouts: int = 1,
    task: str = "sudoku",
    stream: int = 0,
) -> pd.DataFrame:
    """End-to-end and counterfactual rows per arm, whose (perception, reasoning) rates are `rates[arm]`.

    Perception and reasoning are independent and an end-to-end answer needs both: the null model.
    """
    rng = np.random.default_rng(stream)
    index = pd.MultiIndex.from_product(
        [rates, seeds, ["end_to_end", "counterfactual"], [f"test-{i:04}" for i in range(problems)], range(rollouts)],
        names=["arm", "seed", "mode", "problem_id", "rollout"],
    )
    rows = index.to_frame(index=False).assign(task=task, family="qwen3_vl", parse_failure="")
    rows["ground_truth"] = rows.problem_id
    p, q = (rows.arm.map({arm: rate[i] for arm, rate in rates.items()}) for i in (0, 1))
    rows["a_p"] = (rng.random(len(rows)) < p) | (rows["mode"] == "counterfactual")
    rows["a_own"] = rng.random(len(rows)) < q
    rows["a"] = rows.a_p & rows.a_own
    rows["a_p_graded"] = np.maximum(rows.a_p, rng.random(len(rows)))
    return rows.astype({"a": float, "a_p": float, "a_own": float})


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(end-to-end, counterfactual) rows."""
    return rows[rows["mode"] == "end_to_end"], rows[rows["mode"] == "counterfactual"]
