"""Splits without a shared problem, as data sets with the published columns plus ours.

Published: `query, image, ground_truth, response`. Ours beside them: `problem_id`, `task`, `perception` (p*).
"""

import hashlib
import itertools
from collections.abc import Iterator
from random import Random
from typing import Any

import PIL.Image
from datasets import Dataset, Features, Image, Value, disable_progress_bars

from asym.params import Params
from asym.runs import Run, repo_root
from asym.tasks import Drawing, Task, get_task
from asym.transcript import compose

# A problem belongs to the split its hash falls into: no two splits can share one, whatever the seed.
SHARES = {"train_base": 0.5, "train_sft": 0.25, "train_rl": 0.1, "validation": 0.05, "test": 0.1}
disable_progress_bars()  # conversion takes moments; long work has the study's own bar

ATTEMPTS = 20_000  # draws for one problem before a split counts as exhausted
FEATURES = Features(
    {"problem_id": Value("string"), "task": Value("string"), "query": Value("string"), "image": Image()}
    | {column: Value("string") for column in ("ground_truth", "perception", "response")}
)


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

    Raises ValueError when the space has no further problem for the split.
    """
    seen = set()
    for index in itertools.count():
        rng = stream(seed, f"{task.name}/{split}", index, "scene" if scenes else "problem")
        for _ in range(ATTEMPTS):
            problem = task.sample_scene(rng) if scenes else task.sample(rng)
            if problem not in seen and split_of(task, problem) == split:
                break
        else:
            raise ValueError(f"{task} has only {len(seen)} distinct problems for {split}: ask for fewer")
        seen.add(problem)
        yield problem


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


def drawn_by(name: str) -> tuple[str, ...]:
    """The parameters that decide a task's problems, their drawings and their prompts."""
    size = ("sudoku_size", "blanks_min", "blanks_max") if name == "sudoku" else ("vertices_min", "vertices_max")
    return "prompt_style", "image_size", f"difficulty_{name}", *size


def load_split(p: Params, name: str, split: str, seed: int) -> Dataset:
    """A split from its parquet file in `runs/`, written first where there is none yet."""
    keys = (*drawn_by(name), "verbosity", "variation", f"n_{split}")
    config = {key: getattr(p, key) for key in keys} | {"task": name, "split": split, "seed": seed}
    run = Run.open(repo_root(), f"data-{name}-{split}", config)
    path = run.folder / f"{split}.parquet"
    with run.locked():  # arms side by side come for the same split
        if not run.done:
            build_split(p, name, split, seed).to_parquet(path)
            run.finish()
    return Dataset.from_parquet(str(path), cache_dir=str(run.folder / "cache"))
