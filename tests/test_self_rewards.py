import json

import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

from asym import self_rewards
from asym.self_rewards import Policy, image_dependence, perception_likelihood, self_blindfold, with_self_rewards
from asym.tasks import Sudoku
from asym.transcript import compose, prefill

SUDOKU = Sudoku()
SOLUTION = ((1, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 1))
PUZZLE = ((0, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 0))
SEEN, GRID = SUDOKU.transcribe(PUZZLE), json.dumps(SOLUTION)
MISREAD = SEEN.replace("[3, 4, 1, 2]", '[3, 4, "-", 2]')
GOOD, OTHER = compose(SEEN, "so", GRID), compose(MISREAD, "so", GRID)
TEXTS = [GOOD, GOOD.replace(">so<", ">hence<"), OTHER, "<perception>[[1"]


@pytest.fixture
def policy(vlm):
    return Policy(*vlm, max_new_tokens=12, batch=3)


def white(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), "white")] * n


def test_the_blindfolded_model_goes_on_from_its_own_perception(policy, monkeypatch):
    asked = []

    def complete(model, processor, queries, images, prefixes, **_):
        asked.append((queries, images, prefixes))
        answers = {prefill(SEEN): GRID, prefill(MISREAD): GRID.replace("1, 2, 3, 4", "2, 1, 3, 4")}
        return [f"{prefix}<reasoning>so</reasoning>\n<answer>{answers[prefix]}</answer>" for prefix in prefixes]

    monkeypatch.setattr(self_rewards, "complete", complete)
    found = self_blindfold(SUDOKU, [PUZZLE] * 4, TEXTS, ["Solve."] * 4, white(4), policy)
    assert found == [1, 1, 0, 0]
    assert asked == [(["Solve."] * 2, [None] * 2, [prefill(SEEN), prefill(MISREAD)])]


def test_a_real_model_is_asked_without_disturbing_its_training(policy):
    policy.model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    asked = (SUDOKU, [PUZZLE] * 4, TEXTS, ["Solve."] * 4, white(4), policy)
    first, second = self_blindfold(*asked), image_dependence(*asked)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.model.training
    assert all(0 <= value <= 1 for value in first + second)
    assert first[3] == second[3] == 0
    assert all(q.grad is None for q in policy.model.parameters())


def test_image_dependence_is_the_likelihood_lost_per_token(policy, monkeypatch):
    found = image_dependence(SUDOKU, [PUZZLE] * 4, TEXTS, ["Solve."] * 4, white(4), policy)
    rows = [{"query": "Solve.", "response": prefill(SEEN), "image": image} for image in white(1)]
    blind = [row | {"image": Image.new("RGB", (32, 32), "grey")} for row in rows]
    ratio = (perception_likelihood(policy, rows) - perception_likelihood(policy, blind)).item()
    assert found[0] == found[1] == pytest.approx(max(0, 1 - 2.718281828459045 ** (-ratio)), abs=1e-5)
    values = iter([torch.tensor([-0.5, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0])])
    monkeypatch.setattr(self_rewards, "perception_likelihood", lambda *_: next(values))
    found = image_dependence(SUDOKU, [PUZZLE] * 4, TEXTS, ["Solve."] * 4, white(4), policy)
    assert found == pytest.approx([1 - 2.718281828459045**-1, 0, 0, 0])


def test_an_image_that_is_grey_already_accounts_for_nothing(policy):
    grey = [Image.new("RGB", (32, 32), "grey")] * 4
    assert image_dependence(SUDOKU, [PUZZLE] * 4, TEXTS, ["Solve."] * 4, grey, policy) == [0, 0, 0, 0]


def test_the_likelihood_is_that_of_the_perception_tokens_alone(policy):
    rows = [{"query": "Solve.", "response": prefill(SEEN) + tail, "image": white(1)[0]} for tail in ("", "and more")]
    one, other = perception_likelihood(policy, rows).tolist()
    assert one == pytest.approx(other, abs=1e-5)
    assert one < 0


def test_rollouts_get_a_column_for_each(policy, monkeypatch):
    rollouts = pd.DataFrame({"problem_id": ["y", "x"], "ground_truth": SUDOKU.ground_truth(PUZZLE), "completion": GOOD})
    data = Dataset.from_dict({"problem_id": ["x", "y"], "query": ["of x", "of y"], "image": white(2)})
    seen = []

    def reward(task, problems, completions, queries, images, policy):
        seen.append(queries)
        return [0.5] * len(problems)

    monkeypatch.setattr(self_rewards, "SELF_REWARDS", (reward,))
    found = with_self_rewards(SUDOKU, rollouts, data, policy)
    assert seen == [["of y", "of x"]]
    assert list(found.reward) == [0.5, 0.5]
