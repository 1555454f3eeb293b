"""Data in the published schema: `query, image, ground_truth, response` in the splits test, train_sft, train_rl.

What a study needs beyond these columns is derived: p* from the ground truth, the segments of a response from where it
first states p* and where it last answers. Beyond the data cards nothing is known here of the published responses: one
that cannot be taken apart so is left out of SFT and reported, never guessed at.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value, disable_progress_bars, load_dataset

from asym.params import Params, ParamsError
from asym.runs import stamp
from asym.tasks import Task
from asym.tasks.task import MAX_JSON
from asym.transcript import compose, split

disable_progress_bars()  # conversion takes moments; long work has the study's own bar

COLUMNS = ("query", "image", "ground_truth", "response")
SPLITS = ("test", "train_sft", "train_rl")
HUB = "hub:"
_OPENING = re.compile(r"[\[{]")
FEATURES = Features(
    {"problem_id": Value("string"), "task": Value("string"), "query": Value("string"), "image": Image()}
    | {column: Value("string") for column in ("ground_truth", "perception", "response")}
)


def fetch(source: str) -> DatasetDict:
    """The splits of a data set: `hub:<owner>/<dataset>`, or a folder that `load_dataset` reads.

    Raises ParamsError: it cannot be had, or lacks splits or columns.
    """
    name = source.removeprefix(HUB)
    if name == source and not Path(name).expanduser().is_dir():
        raise ParamsError(f"data = {source!r}: must be generated, hub:<owner>/<dataset> or a folder that exists")
    try:
        if name != source:
            found = load_dataset(name)
        else:  # read anew: the cache knows a folder by its name and its files' names, which are the same in all of ours
            anew = {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"}
            found = load_dataset(str(Path(name).expanduser()), **anew)
    except Exception as error:  # hub and readers raise many kinds; all of them mean that there is no data
        reason = f"data = {source!r}: cannot be loaded ({' '.join(str(error).split())[:300]})"
        if name != source:
            reason += f". Without a network: where there is one, `hf download --repo-type dataset {name} --local-dir "
            reason += "FOLDER`; bring the folder here and set data to it"
        raise ParamsError(reason) from None
    missing = [f"split {name}" for name in SPLITS if name not in found]
    missing += [
        f"column {column} of {name}" for name in found for column in COLUMNS if column not in found[name].column_names
    ]
    if missing:
        has = ", ".join(f"{name} ({', '.join(rows.column_names)})" for name, rows in found.items())
        raise ParamsError(f"data = {source!r}: lacks {', '.join(missing)}; it has {has}")
    kinds = {"response": _is_text, "image": lambda feature: isinstance(feature, Image)}
    for column, fits in kinds.items():
        if other := [name for name in found if not fits(found[name].features[column])]:
            wanted = "text" if column == "response" else "images"
            raise ParamsError(
                f"data = {source!r}: must hold {wanted} in the column {column}, not so in {', '.join(other)}"
            )
    return found


def version(source: str) -> dict[str, Any]:
    """What tells the data in a folder from other data that was or will be there: its files' names, sizes and times.

    A data set of the hub is known by its name alone, as what `load_dataset` has cached of it is.
    """
    folder = Path(source).expanduser()
    if source == "generated" or source.startswith(HUB) or not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"files": [[path.relative_to(folder).as_posix(), *stamp(path)] for path in files]}


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def read_split(p: Params, task: Task, name: str) -> tuple[Dataset, Counter[str]]:
    """One split in the columns of a study, at most `p.n_<split>` rows, and how many rows were left out, by reason.

    `validation` is taken where it exists, else from the end of `train_sft`. Left out are rows whose ground truth is no
    problem of the task, training rows whose problem is also one of `test` or `validation`, and of `train_sft` those
    whose response cannot be taken apart. The query is ours: it asks for the segments that the scores read.
    """
    parts, count = fetch(p.data), p.n_validation
    if "validation" not in parts:
        if count >= len(parts["train_sft"]):
            held = f"{len(parts['train_sft'])} rows of train_sft"
            raise ParamsError(f"data = {p.data!r}: n_validation = {count} must leave some of the {held}")
        rows = parts["train_sft"]
        parts["validation"] = rows.select(range(len(rows) - count, len(rows)))
        parts["train_sft"] = rows.select(range(len(rows) - count))
    held_out = set()
    if name.startswith("train"):
        for other in ("test", "validation"):
            held_out |= {problem for problem in _problems(task, parts[other]) if not isinstance(problem, str)}
    rows, left_out, kept = parts[name], Counter(), []
    columns = {column: [] for column in FEATURES if column != "image"}
    for index, (problem, response) in enumerate(zip(_problems(task, rows), rows["response"], strict=True)):
        if len(kept) == getattr(p, f"n_{name}"):
            break
        try:
            if isinstance(problem, str):
                raise ValueError(f"ground truth: {problem}")
            if problem in held_out:
                raise ValueError("its problem is in test or validation, too")
            if name == "train_sft":
                response = segment(task, problem, response)
        except ValueError as error:
            left_out[str(error)] += 1
            continue
        kept.append(index)
        row = {"problem_id": f"{task.name}/{name}/{index}", "task": task.name, "query": task.prompt(problem, "full")}
        row |= {"ground_truth": task.ground_truth(problem), "perception": task.transcribe(problem)}
        for column, value in (row | {"response": response or ""}).items():
            columns[column].append(value)
    if not kept:
        why = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.most_common(3)) or "it is empty"
        raise ParamsError(f"data = {p.data!r}: no row of {name} can be used for {task.name}: {why}")
    images = rows.select(kept).select_columns("image")  # stay encoded as they are
    data = Dataset.from_dict(columns).add_column("image", images.cast_column("image", Image(decode=False))["image"][:])
    return data.select_columns(list(FEATURES)).cast(FEATURES), left_out


def _problems(task: Task, rows: Dataset) -> Iterator[Any]:
    """The problem of every row, or why there is none."""
    for truth in rows["ground_truth"]:
        try:
            yield task.problem(truth)
        except ValueError as error:
            yield str(error)


def segment(task: Task, problem: Any, response: str | None) -> str:
    """A response in this study's grammar, its words kept.

    One that is in the grammar already is taken as it is. Else its perception is the first JSON value that equals p*,
    its answer the last one that solves the problem, its reasoning what stands between. Raises ValueError, with the
    reason, where there is no such thing or perception or answer is wrong.
    """
    own = split(response or "")
    values = [(own.perception, 0, 0), (own.answer, 0, 0)] if not own.failure else list(_json_values(response or ""))
    shown = (k for k, (text, *_) in enumerate(values) if _read(task.parse_perception, text, problem) == problem)
    if (first := next(shown, None)) is None:
        raise ValueError("response: does not state what the image shows")
    solved = (k for k in range(len(values) - 1, first, -1) if _solves(task, values[k][0], problem))
    if (last := next(solved, None)) is None:
        raise ValueError("response: no correct answer after what it sees")
    reasoning = own.reasoning or response[values[first][2] : values[last][1]].strip()
    whole = compose(values[first][0], reasoning, values[last][0])
    if not reasoning or split(whole).failure:
        raise ValueError("response: no reasoning, or tags inside it")
    return whole


def _json_values(text: str) -> Iterator[tuple[str, int, int]]:
    """Every JSON list or object in a text, those inside others too, with its bounds."""
    at, decoder = 0, json.JSONDecoder()
    while match := _OPENING.search(text, at):
        at = match.start()
        try:
            _, length = decoder.raw_decode(text[at : at + MAX_JSON])
        except (ValueError, RecursionError):
            at += 1
        else:
            yield text[at : at + length], at, at + length
            at += 1


def _read(parse: Callable, text: str, problem: Any) -> Any:
    try:
        return parse(text, problem)
    except ValueError:
        return None


def _solves(task: Task, text: str, problem: Any) -> bool:
    answer = _read(task.parse_answer, text, problem)
    return answer is not None and task.solves(answer, problem)
