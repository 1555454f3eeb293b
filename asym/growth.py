"""How time grows with response length, batch, group and parameters, one at a time, and with which exponent."""

import tempfile
import time
from statistics import median

import numpy as np
import pandas as pd
from scipy.stats import linregress
from trl import SFTConfig

from asym import models
from asym.balance import TokenAveraged
from asym.bench import clocked
from asym.data import load_split
from asym.decode import complete
from asym.params import Params
from asym.runs import Run, progress
from asym.sft import SegmentCollator, SegmentSFTTrainer
from asym.training import TRAINING, threads

MIDDLE = {"response tokens": 128, "batch": 8, "group": 8, "width": 128}
SIZES = {"response tokens": (64, 128, 256, 512), "batch": (4, 8, 16, 32), "group": (2, 4, 8, 16)}
SIZES |= {"width": (64, 128, 256, 384)}


def growth(p: Params, start: Run, rounds: int = 3) -> pd.DataFrame:
    """How time grows with one size while the others stay in the middle: a training step, and a batch of rollouts.

    A step is the token-averaged trainer's on `batch` responses; rollouts are `group` responses to each of `batch`
    prompts, all of them of the same length. Weights are random: they make no difference.

    Returns:
        Columns work, axis, size, seconds (median), low, high (extremes over the rounds), exponent and its standard
        error: the slope of log seconds over log size. The axis "parameters" is the width's, counted.
    """
    _, processor = models.load(start.checkpoint, p)
    rows = load_split(p, "sudoku", "train_sft", p.seeds[0]).select(range(max(SIZES["batch"])))
    records = []
    with threads(p.threads * p.workers), progress("growth", sum(map(len, SIZES.values()))) as bar:
        for axis, size in ((axis, size) for axis, sizes in SIZES.items() for size in sizes):
            at = MIDDLE | {axis: size}
            model = models.build_model(processor, p.model_copy(update={"hidden_size": at["width"]}), 0)
            model.generation_config.eos_token_id = -1  # no response ends early
            works = {} if axis == "group" else {"SFT step": _steps}
            works["rollouts"] = _rollouts
            count = sum(q.numel() for q in model.parameters())
            for work, run in works.items():
                times = run(model, processor, rows, at, 1 + rounds)[1:]  # the first warms up
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


def _steps(model, processor, rows, at: dict[str, int], count: int) -> list[float]:
    """Seconds of each of `count` training steps."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            max_steps=count + 1,  # a step's time is known by the end of the one before
            per_device_train_batch_size=at["batch"],
            max_length=None,
            save_strategy="no",
            logging_steps=1000,
            dataset_kwargs={"skip_prepare_dataset": True},
            **TRAINING,
        )
        trainer, clock = clocked(
            SegmentSFTTrainer(
                model=model,
                processing_class=processor,
                args=arguments,
                train_dataset=rows.map(lambda row: {"response": " so" * at["response tokens"]}),
                data_collator=SegmentCollator(processor),
                balance=TokenAveraged(),
            )
        )
        trainer.train()
    return np.diff(clock.ends).tolist()


def _rollouts(model, processor, rows, at: dict[str, int], count: int) -> list[float]:
    """Seconds of each of `count` batches of rollouts."""
    data, times = rows.select(range(at["batch"])), []
    limits = {"max_new_tokens": at["response tokens"], "batch": at["batch"] * at["group"], "temperature": 1.0}
    for _ in range(count):
        begin = time.perf_counter()
        complete(model, processor, data["query"][:], data["image"][:], copies=at["group"], **limits)
        times.append(time.perf_counter() - begin)
    return times
