import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asym.rewards import (
    LABELLED,
    SURROGATES,
    answer_consistency,
    format,
    group_agreement,
    outcome,
    perception,
    perception_graded,
    solver_blindfold,
    validity,
    weights_of,
    with_surrogates,
)
from asym.tasks import GraphColoring, Sudoku
from asym.tasks.graph_coloring import Graph
from asym.transcript import TAGS, compose, prefill

ALL = (*LABELLED, *SURROGATES)
SUDOKU, COLORING = Sudoku(), GraphColoring()
SOLUTION = ((1, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 1))
PUZZLE = ((0, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 0))
SEEN, GRID = SUDOKU.transcribe(PUZZLE), json.dumps(SOLUTION)
SQUARE = Graph(4, ((0, 1), (0, 3), (1, 2), (2, 3)))
EDGES, COLORS = COLORING.transcribe(SQUARE), '["a", "b", "a", "b"]'
patient = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


def one(reward, task, problem, seen, answer) -> float:
    (value,) = reward(task, [problem], [compose(seen, "so", answer)])
    return value


def all_of(task, problem, seen, answer) -> dict:
    return {reward.__name__: one(reward, task, problem, seen, answer) for reward in ALL}


def test_a_right_response_earns_everything_a_lone_rollout_can():
    for task, problem, seen, answer in ((SUDOKU, PUZZLE, SEEN, GRID), (COLORING, SQUARE, EDGES, COLORS)):
        assert all_of(task, problem, seen, answer) == {
            **{"outcome": 1, "perception": 1, "perception_graded": 1, "format": 1, "solver_blindfold": 1},
            **{"validity": 1, "answer_consistency": 1, "group_agreement": 0},
        }


def test_right_eyes_with_a_wrong_answer_earn_what_eyes_earn():
    wrong = GRID.replace("[1, 2, 3, 4]", "[2, 1, 3, 4]")
    assert all_of(SUDOKU, PUZZLE, SEEN, wrong) == {
        **{"outcome": 0, "perception": 1, "perception_graded": 1, "format": 1, "solver_blindfold": 1},
        **{"validity": 1, "answer_consistency": 0, "group_agreement": 0},
    }


def test_wrong_eyes_with_sound_reasoning_earn_consistency_alone():
    misread = json.loads(SEEN)
    misread[0][1], misread[0][2] = 3, 2  # clashes with nothing but the columns: no solution
    assert all_of(SUDOKU, PUZZLE, json.dumps(misread), GRID) == {
        **{"outcome": 1, "perception": 0, "perception_graded": 14 / 16, "format": 1, "solver_blindfold": 0},
        **{"validity": 0, "answer_consistency": 0, "group_agreement": 0},
    }
    triangle = "[[0, 1], [0, 2], [1, 2]]"
    assert all_of(COLORING, SQUARE, triangle, '["a", "b", "c", "a"]') == {
        **{"outcome": 0, "perception": 0, "perception_graded": pytest.approx(2 * 2 / 7), "format": 1},
        **{"solver_blindfold": 0, "validity": 1, "answer_consistency": 1, "group_agreement": 0},
    }


def test_solver_blindfold_pays_for_a_wrong_perception_whose_solution_fits():
    """As its definition says: the outcome verifier judges, not p*. And it never reads the response's own answer."""
    path = "[[0, 1], [1, 2], [2, 3]]"  # one edge of the square missing, the same two colors
    assert one(solver_blindfold, COLORING, SQUARE, path, '["z", "z", "z", "z"]') == 1
    assert one(perception, COLORING, SQUARE, path, COLORS) == 0
    one_more_blank = SEEN.replace('"-", 2, 3, 4', '"-", 2, "-", 4')
    assert one(solver_blindfold, SUDOKU, PUZZLE, one_more_blank, GRID) == 1
    assert one(validity, SUDOKU, PUZZLE, json.dumps([["-"] * 4] * 4), GRID) == 0


@pytest.mark.parametrize(
    "completion",
    ["", "no tags", "[" * 10**6, compose("", "", ""), "x" + compose(SEEN, "", GRID), "<answer>" * 10**5, "٣", "\ud800"],
)
def test_a_response_whose_perception_cannot_be_read_earns_nothing_from_any_reward(completion):
    for reward in ALL:
        assert reward(SUDOKU, [PUZZLE, PUZZLE], [completion, compose(SEEN, "", GRID)])[0] == 0, reward.__name__


@pytest.mark.parametrize(
    "rest", ["", "<reasoning>on and on", "<reasoning></reasoning><answer>?</answer>", compose(SEEN, "", GRID)]
)
def test_a_response_that_saw_right_and_goes_wrong_after_is_paid_for_seeing_alone(rest):
    paid = {reward.__name__: one(reward, SUDOKU, PUZZLE, SEEN, GRID) for reward in ALL}
    for_seeing = {"perception", "perception_graded", "solver_blindfold", "validity", "group_agreement"}
    for reward in ALL:
        got = reward(SUDOKU, [PUZZLE], [prefill(SEEN) + rest])[0]
        assert got == (paid[reward.__name__] if reward.__name__ in for_seeing else 0), reward.__name__


@patient
@given(st.lists(st.lists(st.sampled_from([*TAGS, SEEN, GRID, EDGES]) | st.text()).map("".join), max_size=4))
def test_every_reward_is_one_number_from_0_to_1_per_response(completions):
    for task, problem in ((SUDOKU, PUZZLE), (COLORING, SQUARE)):
        for reward in ALL:
            values = reward(task, [problem] * len(completions), completions)
            assert len(values) == len(completions)
            assert all(isinstance(value, float) and 0 <= value <= 1 for value in values)


def test_group_agreement_is_the_mean_similarity_to_the_others_of_the_same_problem():
    other_problem = Graph(4, ((0, 1),))
    seen = ["[[0, 1], [1, 2]]", "[[0, 1], [1, 2]]", "[[0, 1], [0, 2]]", "[[0, 1]]", None, "[[0, 1]]"]
    problems = [SQUARE, SQUARE, SQUARE, other_problem, SQUARE, other_problem]
    texts = ["garbage" if s is None else compose(s, "", COLORS) for s in seen]
    # similarity (F1) of the first three: 1 between the twins, 1/2 to the third; the garbage agrees with nobody
    expected = [(1 + 0.5 + 0) / 3, (1 + 0.5 + 0) / 3, (0.5 + 0.5 + 0) / 3, 1, 0, 1]
    assert group_agreement(COLORING, problems, texts) == pytest.approx(expected)


def test_group_agreement_needs_no_labels():
    """A group that agrees on something wrong earns as much as one that is right."""
    wrong = [compose("[[0, 2]]", "", COLORS)] * 3
    assert group_agreement(COLORING, [SQUARE] * 3, wrong) == [1, 1, 1]
    assert perception(COLORING, [SQUARE] * 3, wrong) == [0, 0, 0]


def test_surrogates_are_scored_in_columns_of_their_own():
    texts = [compose(SEEN, "…", GRID), compose(GRID, "…", GRID), ""]
    truth = SUDOKU.ground_truth(PUZZLE)
    found = with_surrogates(SUDOKU, pd.DataFrame({"ground_truth": [truth] * 3, "completion": texts}))
    assert list(found.solver_blindfold) == solver_blindfold(SUDOKU, [PUZZLE] * 3, texts) == [1, 1, 0]
    assert set(found.columns) == {"ground_truth", "completion", *(reward.__name__ for reward in SURROGATES)}


def test_rewards_are_pure():
    problems, texts = [SQUARE] * 3, [compose(EDGES, "", COLORS), "x", compose("[[0, 1]]", "", COLORS)]
    for reward in ALL:
        assert reward(COLORING, problems, texts) == reward(COLORING, problems, texts)
    assert (problems, texts[1]) == ([SQUARE] * 3, "x")
    assert perception_graded(COLORING, problems, texts) == pytest.approx([1, 0, 2 / 5])
    assert [outcome(COLORING, problems, texts), format(COLORING, problems, texts)] == [[1, 0, 1], [1, 0, 1]]
    assert answer_consistency(COLORING, problems, texts) == [1, 0, 1]


def test_an_arm_trains_a_mix_that_sums_to_one():
    assert weights_of("outcome", 0.5) == {"outcome": 1}
    assert weights_of("alpha_0.3", 0.5) == {"perception": 0.3, "outcome": 0.7}
    assert weights_of("graded_0.3", 0.5) == {"perception_graded": 0.3, "outcome": 0.7}
    assert weights_of("reweighted_0.3", 0.5) == {"outcome": 1}
    assert weights_of("span_routed", 0.5) == {"perception": 1, "outcome": 1}
    assert weights_of("routed_perception", 0.5) == {"perception": 1}
    assert weights_of("self_blindfold", 0.3) == {"self_blindfold": 0.3, "outcome": 0.7}
    for surrogate in SURROGATES:
        assert weights_of(surrogate.__name__, 0.4) == {surrogate.__name__: 0.4, "outcome": 0.6}


@pytest.mark.parametrize("arm", ["perception", "alpha", "alpha_x", "alpha_2", "alpha_-1", "alpha_nan", ""])
def test_an_unknown_arm_is_refused(arm):
    with pytest.raises(ValueError, match="unknown RL arm"):
        weights_of(arm, 0.5)
