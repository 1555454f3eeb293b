"""How fast the work is beside what one would otherwise run: same model and data, in turns A B A B.

All in one process, but for the arms side by side, which are in processes of their own.

Times vary from machine to machine, their ratios much less. A ratio is our advantage, except in the row of the NGDiff
step, where it is our cost. `low` and `high` are the extremes over the rounds. `limit` says what the machine allows.
Models train at a learning rate of zero, so that rounds differ only in what is sampled.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import pandas as pd
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from asym import evaluate, models, rl
from asym.balance import Balance, NGDiff, TokenAveraged
from asym.data import draw, load_split, task_of
from asym.parallel import side_by_side
from asym.params import Params
from asym.runs import Run, progress
from asym.sft import SegmentCollator, SegmentSFTTrainer
from asym.tasks import get_task
from asym.tasks.graph_coloring import Graph, GraphColoring, _largest_clique, chromatic_number, optimal_coloring
from asym.training import TRAINING, threads
from asym.transcript import prefill

COLUMNS = ["work", "ours", "baseline", "unit", "ratio", "ratio_low", "ratio_high", "target", "limit"]
PROMPTS, GROUP = 16, 8  # of a GRPO step
STEPS = 6  # of a training that is timed, the first of which does not count
WARM = 1  # rounds that do not count


def bench(p: Params, start: Run, rounds: int = 3) -> pd.DataFrame:
    """All measurements at the sizes of a study, with the checkpoint of `start`; one line per work, in `COLUMNS`."""
    task, lines = "sudoku", []
    parts = (training_lines, rl_lines, evaluation_lines, synthesis_lines)
    with threads(p.threads * p.workers), progress("bench", len(parts)) as bar, tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            lines += part(p, start, task, rounds, Path(scratch))
            bar.update()
    return pd.DataFrame(lines, columns=COLUMNS)


def compare(
    work: str,
    unit: str,
    ours: Callable[[], float],
    baseline: Callable[[], float],
    rounds: int,
    target: str,
    limit: str = "",
) -> dict:
    """One line: two ways measured in turns, and the ratio of each round, ours / baseline.

    Both return `unit`s per second, so that the ratio is our advantage; in seconds it is our cost.
    """
    pairs = [(ours(), baseline()) for _ in range(WARM + rounds)][WARM:]
    ratios = [one / other for one, other in pairs]
    line = {"work": work, "ours": median(one for one, _ in pairs), "baseline": median(other for _, other in pairs)}
    line |= {"unit": unit, "ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} | {"target": target, "limit": limit}


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


class _Clock(TrainerCallback):
    """Seconds of every optimizer step, data loading included."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, *args, **kwargs):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(now())

    @property
    def seconds(self) -> float:
        """Per step, without the first."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class _TwoBackwards(SegmentSFTTrainer):
    """NGDiff as it is written: two passes over the whole sequences."""

    def _prefix(self, inputs, segments):
        return inputs, segments


def training_lines(p: Params, start: Run, task: str, rounds: int, scratch: Path) -> list[dict]:
    """Seconds per step of the balances; tokens per second beside TRL's trainer with its own collator."""
    ngdiff, averaged, two, stock, several = (
        partial(seconds, *_trainer(p, start, task, scratch, NGDiff())),
        partial(seconds, *_trainer(p, start, task, scratch, TokenAveraged())),
        partial(seconds, *_trainer(p, start, task, scratch, NGDiff(), _TwoBackwards)),
        partial(seconds, *_stock_trainer(p, start, task, scratch)),
        partial(_several, p, start, task, scratch),
    )
    data, rows = load_split(p, task, "train_sft", p.seeds[0]), SegmentCollator(models.load(start.checkpoint, p)[1])
    tokens = sum(int(rows([data[k]])["attention_mask"].sum()) for k in range(64)) / 64 * p.sft_batch
    rate = lambda timed: lambda: tokens / timed()  # noqa: E731
    steps = lambda timed: lambda: 1 / timed()  # noqa: E731
    beside = f"SFT, {p.workers} arms side by side"
    lines = [
        compare("NGDiff step / token-averaged step", "s", ngdiff, averaged, rounds, "<= 1.25"),
        compare("NGDiff step by prefix / by two backwards", "steps/s", steps(ngdiff), steps(two), rounds, ""),
        compare("SFT, one arm", "tokens/s", rate(averaged), rate(stock), rounds, ">= 1.5"),
        compare(f"{beside}, as a study runs them", "tokens/s", rate(several), rate(stock), rounds, ">= 1.5"),
        compare(f"{beside} / one on all threads", "tokens/s", rate(several), rate(averaged), rounds, ""),
    ]
    model, _ = models.load(start.checkpoint, p)
    weights, peak = sum(q.numel() for q in model.model.language_model.layers.parameters()), matrix_peak(p.hidden_size)
    for line in lines[2:4]:
        share = 6 * weights * line["ours"] / peak
        line["limit"] = f"language layers alone: {share:.0%} of the {peak / 1e9:.0f} GFLOP/s of matrix products here"
    return lines


def seconds(trainer: SFTTrainer, clock: _Clock) -> float:
    """Per step of a short training."""
    trainer.train()
    return clock.seconds


def _several(p: Params, start: Run, task: str, scratch: Path) -> float:
    """Seconds per step of all arms together when `p.workers` of them train side by side."""
    return fmean(side_by_side(p.workers, _arm, [(p, start, task, scratch)] * p.workers)) / p.workers


def _arm(p: Params, start: Run, task: str, scratch: Path) -> float:
    with threads(p.threads):
        return seconds(*_trainer(p, start, task, scratch, TokenAveraged()))


def _trainer(
    p: Params, start: Run, task: str, scratch: Path, balance: Balance, kind: type = SegmentSFTTrainer
) -> tuple[SFTTrainer, _Clock]:
    model, processor = models.load(start.checkpoint, p)
    return clocked(
        kind(
            model=model,
            peft_config=models.prepare_training(model, p),
            processing_class=processor,
            args=_arguments(p, scratch, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=load_split(p, task, "train_sft", p.seeds[0]),
            data_collator=SegmentCollator(processor),
            balance=balance,
        )
    )


def _stock_trainer(p: Params, start: Run, task: str, scratch: Path) -> tuple[SFTTrainer, _Clock]:
    model, processor = models.load(start.checkpoint, p)
    data = load_split(p, task, "train_sft", p.seeds[0])
    prompts = [[{"role": "user", "content": query}] for query in data["query"]]
    completions = [[{"role": "assistant", "content": response}] for response in data["response"]]
    conversations = data.select_columns(["image"]).add_column("prompt", prompts).add_column("completion", completions)
    return clocked(
        SFTTrainer(
            model=model,
            peft_config=models.prepare_training(model, p),
            processing_class=processor,
            args=_arguments(p, scratch),
            train_dataset=conversations,
        )
    )


def _arguments(p: Params, scratch: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(scratch),
        max_steps=STEPS,
        per_device_train_batch_size=p.sft_batch,
        learning_rate=0.0,
        max_length=None,
        save_strategy="no",
        logging_steps=1000,
        **TRAINING,
        **more,
    )


def clocked(trainer: Trainer) -> tuple[Trainer, _Clock]:
    """A trainer that prints nothing, and the clock of its steps."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock := _Clock())
    return trainer, clock


def now() -> float:
    """Seconds on a clock, once all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_peak(width: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> float:
    """FLOP/s of products of the sizes that training has: (4096, width) by (width, 3 width)."""
    a = torch.randn(4096, width, dtype=dtype, device=device)
    b = torch.randn(width, 3 * width, dtype=dtype, device=device)
    times, together = [], 10 if a.is_cuda else 1  # a GPU is given its next product before the last is done
    for _ in range(50):
        begin = now()
        for _ in range(together):
            a @ b
        times.append((now() - begin) / together)
    return 2 * a.numel() * b.shape[1] / median(times)


# ---- reinforcement learning ------------------------------------------------------------------------------------------


def rl_lines(p: Params, start: Run, task: str, rounds: int, scratch: Path) -> list[dict]:
    """GRPO's rollouts and whole steps beside TRL's trainer: the same arguments, rewards and prompts.

    All rewards are paid, so that nearly every row has an advantage; an arm with one reward spares more gradients.
    """
    model, processor = models.load(start.checkpoint, p)
    models.prepare_training(model, p.model_copy(update={"lora_rank": 0}))  # both trainers share this model
    arguments = GRPOConfig(
        output_dir=str(scratch / "trainer"),
        max_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=p.max_new_tokens,
        temperature=p.rl_temperature,
        generation_kwargs={"suppress_tokens": models.image_token_ids(processor)},
        save_strategy="no",
        logging_steps=1000,
        **TRAINING,
    )
    rewards = [rl.as_trl(reward, task_of(p, task)) for reward in rl.REWARDS]
    found = {}

    def step(kind: type) -> Callable[[], None]:
        data = rl.prompts(load_split(p, task, "train_rl", p.seeds[0]))
        trainer, clock = clocked(
            kind(model=model, args=arguments, reward_funcs=rewards, train_dataset=data, processing_class=processor)
        )
        trainer.rollouts = scratch / "rollouts"
        generate = trainer._generate

        def timed(prompts):
            begin = time.perf_counter()
            output = generate(prompts)
            seconds, lengths = time.perf_counter() - begin, [len(ids) for ids in output[1]]
            found[kind, "tokens/s"] = sum(lengths) / seconds
            read = sum(len(ids) * n + n * n / 2 for ids, n in zip(output[0], lengths, strict=True))
            found["columns"] = read / sum(lengths)  # of keys and values that a token attends to, on average
            return output

        trainer._generate = timed

        def run() -> None:
            trainer.train()
            found[kind, "steps/s"] = 1 / clock.seconds

        return run

    runs = {kind: step(kind) for kind in (rl.RolloutTrainer, GRPOTrainer)}
    measured = []
    for k in range(WARM + rounds):
        for run in runs.values():
            torch.manual_seed(k)
            run()
        measured.append(dict(found))
    lines = []
    for work, unit, target in (("GRPO rollouts", "tokens/s", ">= 2.5"), ("GRPO step", "steps/s", ">= 1.7")):
        ours, baseline = (iter([m[kind, unit] for m in measured]) for kind in runs)
        lines.append(compare(work, unit, ours.__next__, baseline.__next__, rounds, target))
    text = model.config.text_config
    column = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4  # bytes of keys and values
    reach = memory_bandwidth() / (column * found["columns"])
    lines[0]["limit"] = f"{reach:.0f} tokens/s if a step cost no more than reading its keys and values from memory"
    return lines


def memory_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes per second that a sum over much memory reads."""
    much, times = torch.ones(2**30 if torch.device(device).type == "cuda" else 2**26, device=device), []
    for _ in range(5):
        begin = now()
        much.sum()
        times.append(now() - begin)
    return much.numel() * 4 / median(times)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluation_lines(p: Params, start: Run, task: str, rounds: int, scratch: Path) -> list[dict]:
    """a, a_p and a_r of the validation problems beside three calls of `generate`: answer, perception, given p*."""
    model, processor = models.load(start.checkpoint, p)
    data = load_split(p, task, "validation", 0)
    bad = models.image_token_ids(processor)

    def ours() -> float:
        begin = time.perf_counter()
        evaluate.responses(p, start, task, 0, "validation", 1)
        return len(data) / (time.perf_counter() - begin)

    @torch.inference_mode()
    def plain() -> float:
        begin = time.perf_counter()
        longest = max(len(ids) for ids in processor.tokenizer(data["perception"][:])["input_ids"]) + 2
        for given, length in ((False, p.max_new_tokens), (False, longest), (True, p.max_new_tokens)):
            for first in range(0, len(data), p.eval_batch):
                rows = data[first : first + p.eval_batch]
                starts = [prefill(text) if given else "" for text in rows["perception"]]
                prompts = zip(rows["query"], starts, strict=True)
                texts = [models.chat(processor, query, image=True) + begun for query, begun in prompts]
                inputs = processor(text=texts, images=rows["image"], padding=True, return_tensors="pt")
                written = model.generate(**inputs, max_new_tokens=length, do_sample=False, suppress_tokens=bad)
                processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return len(data) / (time.perf_counter() - begin)

    return [compare("evaluation of a, a_p, a_r", "problems/s", ours, plain, rounds, ">= 2.5")]


# ---- data synthesis --------------------------------------------------------------------------------------------------


def synthesis_lines(p: Params, start: Run, task: str, rounds: int, scratch: Path) -> list[dict]:
    """Puzzles beside reasoning-gym's and gcol's; whole samples of the study, which have no like, per core."""
    import gcol
    import networkx
    from reasoning_gym.games.sudoku import SudokuConfig, SudokuDataset

    sudoku, graphs = get_task("sudoku", size=9, blanks=(16, 16)), GraphColoring((7, 9))
    seeds = itertools.count()

    def rate(make: Callable, given: Callable[[], list]) -> Callable[[], float]:
        def run() -> float:
            inputs, begin = given(), time.perf_counter()
            for each in inputs:
                make(each)
            return len(inputs) / (time.perf_counter() - begin)

        return run

    def streams(count: int) -> list[Random]:
        return [Random(next(seeds)) for _ in range(count)]

    def theirs() -> float:
        config = SudokuConfig(min_empty=16, max_empty=16, seed=next(seeds), size=100)
        begin = time.perf_counter()
        for row in SudokuDataset(config):
            row["question"]
        return 100 / (time.perf_counter() - begin)

    drawn = [graphs.sample(Random(k)) for k in range(500)]
    as_networkx = [networkx.empty_graph(graph.n) for graph in drawn]
    for ours, graph in zip(drawn, as_networkx, strict=True):
        graph.add_edges_from(ours.edges)

    def proven(graph) -> int:
        for cached in (optimal_coloring, _largest_clique):
            cached.cache_clear()
        return chromatic_number(Graph(graph.n, graph.edges))  # anew: a graph keeps its neighbours

    lines = [
        compare(
            "Sudoku 9×9, 16 blanks", "puzzles/s", rate(sudoku.sample, partial(streams, 200)), theirs, rounds, ">= 20"
        ),
        compare(
            "chromatic number",
            "graphs/s",
            rate(proven, lambda: drawn),
            rate(gcol.chromatic_number, lambda: as_networkx),
            rounds,
            ">= 5",
        ),
    ]
    for name in p.tasks:
        small = task_of(p, name)

        def sample(rng: Random, name=name, small=small) -> None:
            problem = small.sample(rng)
            small.explain(problem, rng, p.verbosity, p.variation)
            draw(p, name, problem, rng)

        with threads(1):
            speed = median(rate(sample, partial(streams, 300))() for _ in range(rounds))
        line = {"work": f"samples with image and trace, {name}", "ours": round(speed, 1), "unit": "samples/s"}
        lines.append(line | {"target": ">= 500/s"})
    return lines
