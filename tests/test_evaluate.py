import json
from dataclasses import asdict

import pandas as pd
import pytest

from asym import evaluate
from asym.data import load_split, task_of
from asym.evaluate import COLUMNS, measure, measure_along
from asym.scoring import score
from asym.transcript import prefill

WHO = {"stage": "sft", "arm": "ngdiff", "seed": 0}
ABOUT = ["task", "family", "stage", "arm", "seed"]
SCORES = ["a", "a_p", "a_p_graded", "a_own", "parse_failure"]


@pytest.fixture
def oracle(monkeypatch):
    """Completions written by hand in place of the tiny model's: right, misread, unfinished, and nonsense in turn."""
    calls = []

    def complete(model, processor, queries, images, prefixes, copies, **settings):
        calls.append(settings | {"images": images, "prefixes": prefixes})
        data = load_split(*oracle.source)
        place = {image.tobytes(): k for k, image in enumerate(data["image"])}
        elsewhere = data[-1]["response"].split("<reasoning>")[0]
        misread = lambda text: elsewhere + text[text.index("<reasoning>") :]  # noqa: E731
        edits = (str, misread, lambda text: text[:-9], lambda text: "🙂 <answer>")
        wanted = [(place[image.tobytes()], copy) for image in images for copy in range(copies)]
        return [edits[(k * copies + copy) % 4](data[k]["response"]) for k, copy in wanted]

    oracle = lambda *source: setattr(oracle, "source", source) or calls  # noqa: E731
    monkeypatch.setattr(evaluate, "complete", complete)
    return oracle


def rescored(p, rows: pd.DataFrame) -> pd.DataFrame:
    """Every score from the stored ground truth and text alone."""
    scores = []
    for row in rows.itertuples():
        task = task_of(p, row.task)
        scores.append(asdict(score(task, task.problem(json.loads(row.ground_truth)), row.completion)))
    return pd.DataFrame(scores, index=rows.index)[SCORES]


@pytest.mark.parametrize("name", ["sudoku", "graph_coloring"])
def test_there_is_one_complete_row_per_problem_and_mode(tiny, base, root, name):
    p = tiny()
    rows = measure(p, base, name, **WHO)
    assert list(rows) == [*ABOUT, *COLUMNS]
    assert rows.notna().all(axis=None)
    assert rows.groupby("mode").problem_id.nunique().to_dict() == {"end_to_end": p.n_test, "counterfactual": p.n_test}
    assert len(rows) == 2 * p.n_test
    assert {column: rows[column].unique().tolist() for column in ABOUT} == {
        **{"task": [name], "family": ["qwen3_vl"], "stage": ["sft"], "arm": ["ngdiff"], "seed": [0]}
    }
    data = load_split(p, name, "test", 0)
    truths = dict(zip(data["problem_id"], data["ground_truth"], strict=True))
    assert rows.ground_truth.tolist() == rows.problem_id.map(truths).tolist()
    pd.testing.assert_frame_equal(rows[SCORES], rescored(p, rows))
    assert (rows.n_tokens > 0).all()


@pytest.mark.parametrize("name", ["sudoku", "graph_coloring"])
def test_counterfactual_rows_begin_with_the_true_perception(tiny, base, root, name):
    p = tiny(n_test=3)
    rows = measure(p, base, name, **WHO).set_index(["mode", "problem_id"])
    for row in load_split(p, name, "test", 0):
        completion = rows.completion["counterfactual", row["problem_id"]]
        start = prefill(row["perception"])
        assert completion.startswith(start)
        assert len(completion) > len(start)
        assert not rows.completion["end_to_end", row["problem_id"]].startswith(start)


@pytest.mark.parametrize("name", ["sudoku", "graph_coloring"])
def test_scores_are_those_of_the_stored_text(tiny, base, root, oracle, name):
    p = tiny(n_test=8)
    calls = oracle(p, name, "test", 0)
    rows = measure(p, base, name, **WHO)
    pd.testing.assert_frame_equal(rows[SCORES], rescored(p, rows))
    right, misread, unfinished, nonsense = (rows.iloc[k::4] for k in range(4))
    assert (right[["a", "a_p", "a_p_graded", "a_own"]] == 1).all(axis=None)
    assert (right.parse_failure == "").all()
    assert (misread.a_p == 0).all()
    assert (unfinished.parse_failure == "no </answer>").all()
    assert (nonsense.parse_failure == "no <perception>").all()
    assert (nonsense[["a", "a_p", "a_p_graded", "a_own"]] == 0).all(axis=None)
    assert (unfinished[["a", "a_own"]] == 0).all(axis=None)
    assert (unfinished.a_p == 1).all()  # it saw right before it broke off
    assert [call["temperature"] for call in calls] == [0, 0]
    assert all(image is not None for call in calls for image in call["images"])


def test_measuring_twice_gives_the_same_rows_and_generates_once(tiny, base, root, monkeypatch):
    one = measure(tiny(), base, "sudoku", **WHO)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "complete", None)
        again = measure(tiny(), base, "sudoku", stage="base", arm="ngdiff", seed=0)
    pd.testing.assert_frame_equal(one, again.assign(stage="sft"))
    monkeypatch.setattr("asym.evaluate.repo_root", lambda: root / "elsewhere")
    pd.testing.assert_frame_equal(one, measure(tiny(), base, "sudoku", **WHO))


def test_a_greedy_response_that_saw_right_is_its_own_counterfactual(tiny, base, root, oracle):
    p = tiny(n_test=8)
    calls = oracle(p, "sudoku", "test", 0)
    rows = measure(p, base, "sudoku", **WHO).set_index(["mode", "problem_id"]).completion
    own, counterfactual = (rows[mode] for mode in ("end_to_end", "counterfactual"))
    truths = load_split(p, "sudoku", "test", 0)["perception"][:]
    seen = [own.iloc[k].startswith(prefill(truths[k])) for k in range(8)]
    whole = [own.iloc[k].endswith("</answer>") for k in range(8)]
    assert (own == counterfactual)[[a and b for a, b in zip(seen, whole, strict=True)]].all()
    asked = calls[1]["prefixes"]
    assert asked == [prefill(truths[k]) for k in range(8) if not (seen[k] and whole[k])]
    assert len(asked) == 6


def test_sampled_rollouts_form_groups_at_the_rl_temperature(tiny, base, root, oracle):
    p = tiny(n_train_rl=3, n_coupling=2, rl_temperature=0.7)
    calls = oracle(p.model_copy(update={"n_train_rl": 2}), "sudoku", "train_rl", 0)
    rows = measure(p, base, "sudoku", **WHO, split="train_rl", rollouts=4)
    assert len(rows) == 2 * 2 * 4
    groups = rows.groupby(["mode", "problem_id"]).rollout.apply(list)
    assert groups.tolist() == [[0, 1, 2, 3]] * 4
    assert rows.problem_id.nunique() == 2
    assert [call["temperature"] for call in calls] == [0.7, 0.7]


def test_rollouts_of_a_checkpoint_are_of_the_same_problems_of_a_split_at_every_seed(tiny, base, root):
    p = tiny(n_validation=3, n_coupling=2)
    one, other = (measure(p, base, "sudoku", **WHO | {"seed": k}, split="validation", rollouts=2) for k in (0, 1))
    first = load_split(p, "sudoku", "validation", 0)["ground_truth"][:2]
    assert one.ground_truth.unique().tolist() == other.ground_truth.unique().tolist() == first
    assert one.completion.tolist() != other.completion.tolist()
    greedy = measure(p, base, "sudoku", **WHO, split="validation")
    assert greedy.problem_id.nunique() == 3


def test_rows_of_another_seed_are_not_taken_for_this_one(tiny, base, root):
    """One base serves all seeds; sampled rollouts, and the problems of `train_rl`, are the seed's own."""
    one, other = (
        measure(tiny(), base, "sudoku", "base", "base", seed, split="train_rl", rollouts=2) for seed in (0, 1)
    )
    assert one.ground_truth.tolist() != other.ground_truth.tolist()
    assert other.ground_truth.tolist()[:4:2] == load_split(tiny(), "sudoku", "train_rl", 1)["ground_truth"]


def test_along_a_training_every_checkpoint_answers_the_validation_problems(tiny, base, root):
    p = tiny()
    rows = measure_along(p, {1: base, 5: base}, "sudoku", "sft", "ngdiff", 0)
    assert rows.groupby("step").problem_id.nunique().to_dict() == {1: p.n_validation, 5: p.n_validation}
    plain = measure(p, base, "sudoku", "sft", "ngdiff", 0, split="validation")
    pd.testing.assert_frame_equal(rows[rows.step == 5].drop(columns="step").reset_index(drop=True), plain)
