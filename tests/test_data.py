import itertools
import json
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from asym.data import SHARES, build_split, load_split, problems, split_of, stream, task_of
from asym.params import ParamsError
from asym.scoring import score
from asym.tasks import GraphColoring, Sudoku
from asym.transcript import split as take_apart

TASKS = ("sudoku", "graph_coloring")
COLUMNS = ["problem_id", "task", "query", "image", "ground_truth", "perception", "response"]


def first(task, split: str, seed: int, count: int, **kwargs) -> list:
    return list(itertools.islice(problems(task, split, seed, **kwargs), count))


@pytest.mark.parametrize("task", [Sudoku(), GraphColoring()], ids=TASKS)
def test_no_two_splits_share_a_problem_whatever_the_seeds(task):
    found = {split: {x for seed in (0, 1) for x in first(task, split, seed, 60)} for split in SHARES}
    found["scenes"] = set(first(task, "train_base", 0, 60, scenes=True)) - found.pop("train_base")
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other


@pytest.mark.parametrize("task", [Sudoku(), GraphColoring()], ids=TASKS)
def test_problems_of_a_split_are_distinct_and_differ_between_seeds(task):
    one, other = (first(task, "train_sft", seed, 60) for seed in (0, 1))
    assert len(set(one)) == len(set(other)) == 60
    assert one != other
    assert one == first(task, "train_sft", 0, 60)


def test_splits_have_their_shares_of_the_space():
    rng = stream(0, "", 0)
    counts = Counter(split_of(GraphColoring((7, 9)), GraphColoring((7, 9)).sample(rng)) for _ in range(4000))
    assert {name: counts[name] / 4000 for name in SHARES} == pytest.approx(SHARES, abs=0.03)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_neighbouring_streams_share_nothing():
    draws = [stream(seed, split, k).random() for seed in (0, 1) for split in ("test", "train_sft") for k in range(50)]
    assert len(set(draws)) == 200
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.2


def test_an_exhausted_space_is_an_error_that_says_how_many_there_are(monkeypatch):
    task = GraphColoring((3, 3))
    there = {x for x in (task.sample(stream(0, "all", k)) for k in range(500)) if split_of(task, x) == "train_base"}
    monkeypatch.setattr("asym.data.ATTEMPTS", 500)
    with pytest.raises(ParamsError, match=rf"n_train_base: must be at most {len(there)}: "):
        list(problems(task, "train_base", 0))


@pytest.mark.parametrize("name", TASKS)
def test_a_row_holds_the_published_columns_and_what_they_must_agree_on(tiny, name):
    p = tiny(image_size=64)
    data, task = build_split(p, name, "train_sft", 0), task_of(p, name)
    assert data.column_names == COLUMNS
    assert len(data) == p.n_train_sft
    assert len(set(data["problem_id"])) == len(data)
    for row in data:
        problem = task.problem(row["ground_truth"])
        assert split_of(task, problem) == "train_sft"
        assert row["perception"] == task.transcribe(problem) == take_apart(row["response"]).perception
        assert row["query"] == task.prompt(problem, "brief")
        assert row["image"].size == (64, 64)
        result = score(task, problem, row["response"])
        assert (result.a, result.a_p, result.parse_failure) == (1, 1, "")
        assert isinstance(json.loads(row["ground_truth"]), list if name == "sudoku" else dict)


def test_sizes_and_knobs_reach_the_rows(tiny):
    changes = {"sudoku_size": 9, "blanks_min": 14, "blanks_max": 18, "image_size": 96, "prompt_style": "full"}
    row = build_split(tiny(n_test=1, **changes), "sudoku", "test", 0)[0]
    assert len(json.loads(row["ground_truth"])) == 9
    assert row["image"].size == (96, 96)
    assert "9x9" in row["query"]
    long = build_split(tiny(n_test=1, verbosity=8), "sudoku", "test", 0)[0]["response"]
    assert len(long) > 1.5 * len(build_split(tiny(n_test=1, verbosity=0), "sudoku", "test", 0)[0]["response"])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("text", [{"variation": 0.0}, {"verbosity": 5}], ids=str)
def test_the_images_do_not_depend_on_the_text(tiny, name, text):
    one, other = (build_split(tiny(**changes), name, "test", 0)[:] for changes in ({}, text))
    assert one["ground_truth"] == other["ground_truth"]
    assert one["response"] != other["response"]
    assert [image.tobytes() for image in one["image"]] == [image.tobytes() for image in other["image"]]


@pytest.mark.parametrize("name", TASKS)
def test_building_twice_gives_the_same_bytes(tiny, tmp_path, name):
    for k in (0, 1):
        build_split(tiny(), name, "train_rl", 3).to_parquet(tmp_path / f"{k}.parquet")
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()


@pytest.mark.parametrize("name", TASKS)
def test_only_the_training_splits_depend_on_the_seed(tiny, name):
    rows = {
        (split, seed): build_split(tiny(), name, split, seed)[:]
        for split in SHARES
        if split != "train_base"
        for seed in (0, 1)
    }
    for split in ("train_sft", "train_rl"):
        assert rows[split, 0]["ground_truth"] != rows[split, 1]["ground_truth"]
    for split in ("validation", "test"):
        assert rows[split, 0] == rows[split, 1]


def test_more_problems_begin_with_the_same_ones(tiny):
    few, many = (build_split(tiny(n_test=n), "sudoku", "test", 0)[:3] for n in (3, 6))
    assert few == many


def test_a_written_split_opens_with_datasets_and_pandas_and_is_not_built_again(tiny, root, monkeypatch):
    p = tiny()
    data = load_split(p, "sudoku", "test", 0)
    (path,) = root.glob("runs/data-sudoku-test-*/test.parquet")
    opened = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(root / "cache"))["train"]
    assert opened.column_names == COLUMNS
    assert isinstance(opened[0]["image"], Image.Image)
    frame = pd.read_parquet(path)
    assert list(frame) == COLUMNS
    assert list(frame["response"]) == data["response"]
    monkeypatch.setattr("asym.data.build_split", None)
    assert load_split(p, "sudoku", "test", 0)[:] == data[:]


def test_what_a_split_depends_on_names_its_folder(tiny, root):
    for p in (tiny(), tiny(variation=0.5), tiny(difficulty_sudoku=0.1), tiny(n_test=3), tiny(blanks_max=7)):
        load_split(p, "sudoku", "test", 0)
    load_split(tiny(difficulty_graph_coloring=0.1, n_train_sft=3, vertices_max=7), "sudoku", "test", 0)
    assert len(list(root.glob("runs/data-*"))) == 5
