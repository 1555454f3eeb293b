"""How time grows with response length, batch, group and parameters, one at a time, and with which exponent."""

import time
from functools import partial
from statistics import median

import numpy as np
import pandas as pd
from scipy.stats import linregress

from asym import models
from asym.data import load_split
from asym.decode import complete
from asym.params import Params
from asym.runs import Run, progress
from asym.sft import SegmentCollator, threads

MIDDLE = {"response tokens": 128, "batch": 8, "group": 8, "width": 128}
SIZES = {"response tokens": (64, 128, 256, 512), "batch": (4, 8, 16, 32), "group": (2, 4, 8, 16)}
SIZES |= {"width": (64, 128, 256, 384)}


def growth(p: Params, start: Run, rounds: int = 3) -> pd.DataFrame:
    """How time grows with one size while the others stay in the middle: a training step, and a batch of rollouts.

    A step is a pass forth and back over `batch` responses; rollouts are `group` responses to each of `batch` prompts,
    all of them of the same length. Weights are random: they make no difference.

    Returns:
        Columns work, axis, size, seconds (median), low, high (extremes over the rounds), exponent and its standard
        error: the slope of log seconds over log size. The axis "parameters" is the width's, counted.
    """
    _, processor = models.load(start.checkpoint)
    rows = load_split(p, "sudoku", "train_sft", p.seeds[0]).select(range(max(SIZES["batch"])))
    records = []
    with threads(p.threads * p.workers), progress("growth", sum(map(len, SIZES.values()))) as bar:
        for axis, size in ((axis, size) for axis, sizes in SIZES.items() for size in sizes):
            at = MIDDLE | {axis: size}
            model = models.build_model(processor, p.model_copy(update={"hidden_size": at["width"]}), 0)
            model.generation_config.eos_token_id = -1  # no response ends early
            works = {"SFT step": partial(_step, model, processor, rows, at)} if axis != "group" else {}
            works["rollouts"] = partial(_rollouts, model, processor, rows, at)
            count = sum(q.numel() for q in model.parameters())
            for work, run in works.items():
                times = [run() for _ in range(1 + rounds)][1:]  # the first warms up
                line = {"work": work, "axis": axis, "size": size}
                if axis == "width":
                    line |= {"axis": "parameters", "size": count}
                records.append(line | {"seconds": median(times), "low": min(times), "high": max(times)})
            bar.update()
    table = pd.DataFrame(records)
    for _, part in table.groupby(["work", "axis"]):
        fit = linregress(np.log(part["size"]), np.log(part.seconds))
        table.loc[part.index, ["exponent", "standard_error"]] = fit.slope, fit.stderr
    return table.sort_values(["work", "axis", "size"], ignore_index=True).round(4)


def _step(model, processor, rows, at: dict[str, int]) -> float:
    """Seconds of a pass forth and back."""
    chosen = [rows[k] | {"response": " so" * at["response tokens"]} for k in range(at["batch"])]
    batch = SegmentCollator(processor)(chosen)
    batch.pop("segments")
    model.train()
    model.zero_grad()
    begin = time.perf_counter()
    model(**batch).loss.backward()
    return time.perf_counter() - begin


def _rollouts(model, processor, rows, at: dict[str, int]) -> float:
    """Seconds of a batch of rollouts."""
    data = rows.select(range(at["batch"]))
    limits = {"max_new_tokens": at["response tokens"], "batch": at["batch"] * at["group"], "temperature": 1.0}
    model.eval()
    begin = time.perf_counter()
    complete(model, processor, data["query"][:], data["image"][:], copies=at["group"], **limits)
    return time.perf_counter() - begin
