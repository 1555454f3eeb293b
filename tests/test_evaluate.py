import json
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from asym import evaluate, models
from asym.base import own_format
from asym.data import load_split, task_of
from asym.decode import complete
from asym.evaluate import COLUMNS, measure
from asym.scoring import score
from asym.transcript import prefill

WHO = {"stage": "sft", "arm": "ngdiff", "seed": 0}
ABOUT = ["task", "family", "stage", "arm", "seed"]
SCORES = ["a", "a_p", "a_p_graded", "a_own", "parse_failure"]


@pytest.fixture
def oracle(monkeypatch):
    """Completions written by hand in place of the tiny model's: right, misread, unfinished, and nonsense in turn."""
    calls = []

    def complete(model, processor, queries, images, prefixes, **settings):
        calls.append(settings | {"images": images, "prefixes": prefixes})
        responses = list(load_split(*oracle.source)["response"])
        per_problem = len(queries) // len(responses)
        texts = [response for response in responses for _ in range(per_problem)]
        elsewhere = responses[-1][: responses[-1].index("<reasoning>")]
        misread = lambda text: elsewhere + text[text.index("<reasoning>") :]  # noqa: E731
        edits = (str, misread, lambda text: text[:-9], lambda text: "🙂 <answer>")
        return [edits[k % 4](text) for k, text in enumerate(texts)]

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
    assert (pd.concat([unfinished, nonsense])[["a", "a_p", "a_p_graded", "a_own"]] == 0).all(axis=None)
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


def test_sampled_rollouts_form_groups_at_the_rl_temperature(tiny, base, root, oracle):
    p = tiny(n_train_rl=3, n_coupling=2, rl_temperature=0.7)
    calls = oracle(p.model_copy(update={"n_train_rl": 2}), "sudoku", "train_rl", 0)
    rows = measure(p, base, "sudoku", **WHO, split="train_rl", rollouts=4)
    assert len(rows) == 2 * 2 * 4
    groups = rows.groupby(["mode", "problem_id"]).rollout.apply(list)
    assert groups.tolist() == [[0, 1, 2, 3]] * 4
    assert rows.problem_id.nunique() == 2
    assert [call["temperature"] for call in calls] == [0.7, 0.7]


def test_rows_of_another_seed_are_not_taken_for_this_one(tiny, base, root):
    """One base serves all seeds; sampled rollouts, and the problems of `train_rl`, are the seed's own."""
    one, other = (
        measure(tiny(), base, "sudoku", "base", "base", seed, split="train_rl", rollouts=2) for seed in (0, 1)
    )
    assert one.ground_truth.tolist() != other.ground_truth.tolist()
    assert other.ground_truth.tolist()[:4:2] == load_split(tiny(), "sudoku", "train_rl", 1)["ground_truth"]


def test_own_format_reports_the_base_on_its_three_own_exercises(tiny, base, root):
    rows = own_format(tiny(), base, "sudoku")
    assert rows["mode"].value_counts().to_dict() == {"transcribe_clean": 2, "transcribe_study": 2, "puzzle_in_words": 2}
    assert rows.notna().all(axis=None)


# Decoding


def generate(vlm, rows, **settings) -> list[str]:
    model, processor = vlm
    return complete(model, processor, rows["query"], rows["image"], **{"max_new_tokens": 6, "batch": 8} | settings)


@pytest.fixture
def rows(tiny, root):
    return load_split(tiny(n_test=4), "sudoku", "test", 0)[:]


def test_greedy_completions_do_not_depend_on_the_batch(vlm, rows):
    assert generate(vlm, rows) == generate(vlm, rows, batch=1) == generate(vlm, rows, batch=3)


def test_greedy_completion_is_the_argmax_token_by_token(vlm, rows):
    model, processor = vlm
    (text,) = complete(model, processor, rows["query"][:1], rows["image"][:1], max_new_tokens=3, batch=1)
    inputs = processor(
        text=[models.chat(processor, rows["query"][0], True)], images=rows["image"][:1], return_tensors="pt"
    )
    banned, new = models.image_token_ids(processor), []
    for _ in range(3):
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].clone()
        logits[banned] = -torch.inf
        new.append(logits.argmax().view(1, 1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new[-1]], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.full((1, 1), value)], 1)
    assert text == processor.tokenizer.decode(torch.cat(new)[:, 0], skip_special_tokens=True)


def test_sampling_repeats_with_its_seed_and_varies_without(vlm, rows):
    one, same, other = (generate(vlm, rows, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_completions_begin_with_their_prefix_and_need_no_image(vlm, rows):
    model, processor = vlm
    texts = complete(
        model, processor, ["Why?", "Why?"], [None, rows["image"][0]], ["<perception>[[1", ""], max_new_tokens=4, batch=2
    )
    assert texts[0].startswith("<perception>[[1")
    assert len(texts[0]) > len("<perception>[[1")


def test_a_policy_never_writes_an_image_token(vlm, rows):
    model, processor = vlm
    image = models.image_token_ids(processor)
    with torch.no_grad():  # the image tokens' rows of the tied embedding become the likeliest by far
        embedding = model.get_input_embeddings().weight
        embedding[image] = 50 * torch.randn(len(image), embedding.shape[1]).sign()
    written = []
    keep = model.generate
    model.generate = lambda **kwargs: written.append(keep(**kwargs)) or written[-1]
    generate(vlm, rows, temperature=1.0)
    prompt = processor(
        text=[models.chat(processor, rows["query"][0], True)], images=rows["image"][:1], return_tensors="pt"
    )["input_ids"].shape[1]
    assert not torch.isin(written[0][:, prompt:], torch.tensor(image)).any()
