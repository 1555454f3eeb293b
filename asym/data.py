"""Splits without a shared problem, as data sets with the published columns plus ours.

Published: `query, image, ground_truth, response`. Ours beside them: `problem_id`, `task`, `perception` (p*).
"""

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import PIL.Image
from datasets import Dataset
from transformers import ProcessorMixin

from asym import published
from asym.params import Params, ParamsError
from asym.published import FEATURES
from asym.runs import Run, repo_root, write_csv, write_text
from asym.tasks import Drawing, Task, get_task
from asym.transcript import compose

# A problem belongs to the split its hash falls into: no two splits can share one, whatever the seed.
SHARES = {"train_base": 0.5, "train_sft": 0.25, "train_rl": 0.1, "validation": 0.05, "test": 0.1}

ATTEMPTS = 20_000  # draws for one problem before a split counts as exhausted


def task_of(p: Params, name: str) -> Task:
    """The task at the study's size."""
    if name == "sudoku":
        return get_task(name, size=p.sudoku_size, blanks=(p.blanks_min, p.blanks_max))
    return get_task(name, vertices=(p.vertices_min, p.vertices_max))


def draw(p: Params, name: str, problem: Any, rng: Random) -> PIL.Image.Image:
    """The study's image of a problem."""
    difficulty = p.difficulty_sudoku if name == "sudoku" else p.difficulty_graph_coloring
    return task_of(p, name).draw(problem, Drawing.at(difficulty, p.image_size), rng)


def split_of(task: Task, problem: Any) -> str:
    """The split a problem belongs to, by the hash of its canonical form."""
    digest = hashlib.sha256(f"{task.name} {task.ground_truth(problem)}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    bounds = itertools.accumulate(SHARES.values())
    return next((name for name, bound in zip(SHARES, bounds, strict=True) if position < bound), "test")


def stream(seed: int, split: str, index: int, purpose: str = "") -> Random:
    """The random stream of one item. Hashed, so that neighbouring items share nothing."""
    return Random(f"{seed}/{split}/{index}/{purpose}")


def problems(task: Task, split: str, seed: int, scenes: bool = False) -> Iterator[Any]:
    """Distinct problems of a split, without end; `scenes` draws what the eye is trained on instead.

    Raises ParamsError when the space has no further problem for the split.
    """
    seen = set()
    for index in itertools.count():
        rng = stream(seed, f"{task.name}/{split}", index, "scene" if scenes else "problem")
        for _ in range(ATTEMPTS):
            problem = task.sample_scene(rng) if scenes else task.sample(rng)
            if problem not in seen and split_of(task, problem) == split:
                break
        else:
            raise ParamsError(f"n_{split}: must be at most {len(seen)}: {task} has no more distinct problems for it")
        seen.add(problem)
        yield problem


def enough_graphs(p: Params) -> None:
    """Raises ParamsError if a split asks for more graphs than there are for it, of so few vertices."""
    graphs = sum(2 ** (n * (n - 1) // 2) for n in range(p.vertices_min, p.vertices_max + 1))
    for split, share in SHARES.items():
        if (wanted := getattr(p, f"n_{split}")) > share * graphs:
            few = f"about {share * graphs:.0f} of the {graphs} graphs of {p.vertices_min} to {p.vertices_max} vertices"
            raise ParamsError(f"n_{split} = {wanted}: must be at most {few}")


def build_split(p: Params, name: str, split: str, seed: int) -> Dataset:
    """One split of one task, `p.n_<split>` rows; validation and test are the same for every seed."""
    task = task_of(p, name)
    seed = 0 if split in ("validation", "test") else seed
    rows = []
    for index, problem in enumerate(itertools.islice(problems(task, split, seed), getattr(p, f"n_{split}"))):
        trace = stream(seed, f"{name}/{split}", index, "trace")  # apart from the drawing's: a knob turns one of them
        reasoning, answer = task.explain(problem, trace, p.verbosity, p.variation)
        perception = task.transcribe(problem)
        rows.append(
            {
                "problem_id": f"{name}/{split}/{index}",
                "task": name,
                "query": task.prompt(problem, p.prompt_style),
                "image": draw(p, name, problem, stream(seed, f"{name}/{split}", index, "drawing")),
                "ground_truth": task.ground_truth(problem),
                "perception": perception,
                "response": compose(perception, reasoning, answer),
            }
        )
    return Dataset.from_list(rows, features=FEATURES)


def drawn_by(p: Params, name: str) -> dict[str, Any]:
    """What decides a task's problems, drawings and prompts: parameters, and of a folder of data its files."""
    size = ("sudoku_size", "blanks_min", "blanks_max") if name == "sudoku" else ("vertices_min", "vertices_max")
    keys = ("data", "prompt_style", "image_size", f"difficulty_{name}", *size)
    return {key: getattr(p, key) for key in keys} | published.version(p.data)


def load_split(p: Params, name: str, split: str, seed: int) -> Dataset:
    """A split from its parquet file in `runs/`, written first where there is none yet."""
    run = _split_run(p, name, split, seed)
    return Dataset.from_parquet(str(run.folder / f"{split}.parquet"), cache_dir=str(run.folder / "cache"))


def training_rows(p: Params, name: str, seed: int, processor: ProcessorMixin) -> Dataset:
    """The rows of `train_sft`; of published data, those whose response has at most `p.max_new_tokens` tokens.

    What the model could not write when it is measured it need not learn, and the longest decides over memory. A warning
    counts the others. Raises ParamsError if none is left.
    """
    data = load_split(p, name, "train_sft", seed)
    if p.data == "generated":
        return data
    lengths = [len(ids) for ids in processor.tokenizer(data["response"][:], add_special_tokens=False)["input_ids"]]
    kept = [k for k, length in enumerate(lengths) if length < p.max_new_tokens]  # an end token follows
    if not kept:
        raise ParamsError(f"max_new_tokens = {p.max_new_tokens}: must be above {min(lengths)}, the shortest response")
    if longer := len(data) - len(kept):
        warnings.warn(
            f"{longer} of {len(data)} responses of {name} are longer than max_new_tokens = {p.max_new_tokens}, and "
            "left out of SFT",
            stacklevel=2,
        )
    return data.select(kept)


def left_out(p: Params, name: str, split: str, seed: int) -> pd.DataFrame:
    """The rows of published data that a split does without: columns reason and rows."""
    return pd.read_csv(_split_run(p, name, split, seed).folder / "left_out.csv")


def _split_run(p: Params, name: str, split: str, seed: int) -> Run:
    config = {"task": name, "split": split, f"n_{split}": getattr(p, f"n_{split}")}
    if p.data == "generated":
        config |= drawn_by(p, name) | {"verbosity": p.verbosity, "variation": p.variation, "seed": seed}
    else:  # there is nothing to draw, and one data set for every seed; train_sft may have to give rows to validation
        config |= {"data": p.data, "n_validation": p.n_validation} | published.version(p.data)
    run = Run.open(repo_root(), f"data-{name}-{split}", config)
    with run.locked():  # arms side by side come for the same split
        if not run.done:
            rows, missing = _made(p, name, split, seed)
            rows.to_parquet(run.folder / f"{split}.parquet")
            write_csv(run.folder / "left_out.csv", pd.DataFrame(missing.most_common(), columns=["reason", "rows"]))
            run.finish()
    return run


def _made(p: Params, name: str, split: str, seed: int) -> tuple[Dataset, Counter[str]]:
    if p.data == "generated":
        return build_split(p, name, split, seed), Counter()
    return published.read_split(p, task_of(p, name), split)


def export(p: Params, folder: Path) -> list[Path]:
    """Write the study's splits in the published schema, a data set with its card per task; returns their folders."""
    if p.data != "generated":
        raise ParamsError(f"data = {p.data!r}: must be generated; what is published already needs no export")
    if folder.exists() and not folder.is_dir():
        raise ParamsError(f"--to {folder}: must be a folder, or a new name")
    written = []
    for name in p.tasks:
        target = folder / name
        sizes = {}
        for part in (*published.SPLITS, "validation"):
            rows = load_split(p, name, part, p.seeds[0]).select_columns(list(published.COLUMNS))
            sizes[part], path = len(rows), target / "data" / f"{part}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)
        write_text(target / "README.md", _card(p, name, sizes))
        written.append(target)
    return written


def _card(p: Params, name: str, sizes: dict[str, int]) -> str:
    files = "".join(f"  - split: {part}\n    path: data/{part}-*\n" for part in sizes)
    counts = "\n".join(f"| {part} | {count} |" for part, count in sizes.items())
    knobs = drawn_by(p, name) | {"verbosity": p.verbosity, "variation": p.variation}
    knobs = "\n".join(f"- `{key}`: {value}" for key, value in knobs.items())
    return f"""\
---
configs:
- config_name: default
  data_files:
{files}tags: [synthetic, visual-reasoning]
---
# {name.replace("_", " ").capitalize()}: images whose text and solution are exact

Made by a program from seed {p.seeds[0]}; no problem is in two splits. Columns: `query`, `image`, `ground_truth` (the
problem, as JSON; an answer is judged from it, so every valid one counts), `response` (perception, reasoning and answer,
each in its tags).

| split | rows |
| --- | --- |
{counts}

{knobs}
"""
