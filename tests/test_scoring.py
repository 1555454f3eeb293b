import json
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asym.scoring import Score, read, score
from asym.tasks import GraphColoring, Sudoku
from asym.tasks.graph_coloring import Graph
from asym.transcript import TAGS, compose

SUDOKU, COLORING = Sudoku(), GraphColoring()
PUZZLE = ((0, 2, 0, 4), (3, 0, 1, 0), (2, 1, 4, 3), (4, 3, 2, 1))
SOLUTION = ((1, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 1))
SEEN, GRID = SUDOKU.transcribe(PUZZLE), json.dumps(SOLUTION)
SQUARE = Graph(4, ((0, 1), (0, 3), (1, 2), (2, 3)))
EDGES, COLORS = COLORING.transcribe(SQUARE), '["a", "b", "a", "b"]'
TRUTHS = ((SUDOKU, PUZZLE, SEEN, GRID), (COLORING, SQUARE, EDGES, COLORS))
PERFECT = Score(1.0, 1.0, 1.0, 1.0)
patient = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


def sudoku(perception=SEEN, answer=GRID, problem=PUZZLE) -> Score:
    return score(SUDOKU, problem, compose(perception, "so", answer))


def coloring(perception=EDGES, answer=COLORS, problem=SQUARE) -> Score:
    return score(COLORING, problem, compose(perception, "so", answer))


def test_a_right_response_is_worth_everything():
    assert sudoku() == coloring() == PERFECT


def test_every_valid_answer_counts():
    for answer in ('["b", "a", "b", "a"]', '["z", "q", "z", "q"]', '{"0": "a", "1": "b", "2": "a", "3": "b"}'):
        assert coloring(answer=answer) == PERFECT
    two_solutions = tuple(tuple(0 if x in (1, 2) else x for x in row) for row in SOLUTION)
    seen = SUDOKU.transcribe(two_solutions)
    swapped = json.dumps([[{1: 2, 2: 1}.get(x, x) for x in row] for row in SOLUTION])
    assert sudoku(seen, GRID, two_solutions) == sudoku(seen, swapped, two_solutions) == PERFECT


@pytest.mark.parametrize(
    "answer",
    ['["a", "a", "b", "b"]', '["a", "b", "c", "b"]', '["a", "b", "c", "d"]', '["a", "a", "a", "a"]'],
)
def test_a_coloring_must_be_proper_and_use_the_fewest_colors(answer):
    assert coloring(answer=answer) == Score(a=0.0, a_p=1.0, a_p_graded=1.0, a_own=0.0)


def test_a_grid_must_keep_the_givens_and_complete_every_unit():
    other = json.dumps([[{1: 2, 2: 1}.get(x, x) for x in row] for row in SOLUTION])  # a Sudoku, but another
    assert sudoku(answer=other).a == 0
    assert sudoku(answer=GRID.replace("[1, 2, 3, 4]", "[3, 2, 1, 4]")).a == 0  # rows complete, columns and boxes not


def test_perception_may_list_edges_in_any_order_and_direction():
    assert coloring("[[3, 2], [1, 0], [2, 1], [0, 3]]") == PERFECT


def test_own_perception_reasoning_judges_by_what_the_response_says_it_saw():
    path = "[[0, 1], [1, 2]]"  # sees two of four edges; colors what it saw, and so the square too, or not
    f1 = 2 * 2 / (2 + 4)
    assert coloring(path) == Score(a=1.0, a_p=0.0, a_p_graded=pytest.approx(f1), a_own=1.0)
    assert coloring(path, '["a", "b", "a", "a"]') == Score(a=0.0, a_p=0.0, a_p_graded=pytest.approx(f1), a_own=1.0)
    triangle = "[[0, 1], [0, 2], [1, 2]]"
    assert coloring(triangle).a_own == 0
    assert coloring(triangle).a == 1
    misread = SEEN.replace('"-", 2, "-", 4', '"-", 2, "-", 3')
    assert sudoku(misread) == Score(a=1.0, a_p=0.0, a_p_graded=15 / 16, a_own=0.0)


SAW_RIGHT = {"a_p": 1.0, "a_p_graded": 1.0}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "empty completion"),
        (GRID, "no <perception>"),
        (f"<perception>{SEEN}", "no </perception>"),
        (compose(f"<perception>{SEEN}</perception>", "", GRID), "<perception> more than once"),
        (f"<perception>{SEEN}<answer>{GRID}</answer></perception><reasoning></reasoning>", "tags out of order"),
        ("x" + compose(SEEN, "", GRID), "text outside the tags"),
        (compose("", "", GRID), "perception: not valid JSON"),
        (compose("", SEEN, GRID) + "<answer>", "<answer> more than once"),
        (compose("9" * 3999, "", GRID), "perception: not a list of 4 rows"),
        (compose(SEEN.replace('"-"', "0"), "", GRID), "perception: a cell that is no digit or blank"),
        (compose("[" * 3999, "", GRID), "perception: not valid JSON"),
        (compose("[" * 1_000_000, "", GRID), "perception: more than 4000 characters"),
    ],
)
def test_a_response_whose_perception_cannot_be_read_scores_zero_with_its_reason(completion, reason):
    assert score(SUDOKU, PUZZLE, completion) == Score(parse_failure=reason)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (compose(SEEN, "", GRID) * 2, "<perception> more than once"),
        (compose(SEEN, f"no, <perception>{SEEN.replace('2', '3')}</perception>", GRID), "<perception> more than once"),
        (compose(SEEN, "", GRID) + "<answer>", "<answer> more than once"),
        (compose(SEEN, "", GRID) + "x", "text outside the tags"),
        (compose(SEEN, "round and " * 100, GRID).partition("</reasoning>")[0], "no </reasoning>"),
        (compose(SEEN, "", ""), "answer: not valid JSON"),
        (compose(SEEN, "", GRID.replace("[[1", "[[" + "1" * 3000)), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", "[[1e999")), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", "[[1.0")), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", "[[true")), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", "[[NaN")), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", '[["1"')), "answer: a cell that is no digit"),
        (compose(SEEN, "", GRID.replace("[[1", "[[٣")), "answer: not valid JSON"),
        (compose(SEEN, "", GRID.replace("[[1", "[[5")), "answer: a cell that is no digit"),
        (compose(SEEN, "", SEEN), "answer: a cell that is no digit"),
        (compose(SEEN, "", "[[1, 2], [3, 4]]"), "answer: not a list of 4 rows"),
        (compose(SEEN, "", GRID.replace("[1, 2, 3, 4]", "[1, 2, 3]")), "answer: a row without 4 cells"),
        (compose(SEEN, "", "{}"), "answer: not a list of 4 rows"),
    ],
)
def test_what_is_malformed_after_a_perception_costs_the_answer_not_the_perception(completion, reason):
    assert score(SUDOKU, PUZZLE, completion) == Score(parse_failure=reason, **SAW_RIGHT)
    misread = completion.replace(SEEN, SEEN.replace('"-", 2, "-", 4', '"-", 2, "-", 3'), 1)
    assert score(SUDOKU, PUZZLE, misread) == Score(parse_failure=reason, a_p_graded=15 / 16)


@pytest.mark.parametrize(
    ("perception", "reason"),
    [
        ("[[0, 1], [1, 0]]", "perception: an edge given twice"),
        ("[[1, 1]]", "perception: an edge from a vertex to itself"),
        ("[[0, 4]]", "perception: an edge that is not two vertices from 0 to 3"),
        ("[[0, -1]]", "perception: an edge that is not two vertices from 0 to 3"),
        ("[[0, true]]", "perception: an edge that is not two vertices from 0 to 3"),
        ("[[0, 1, 2]]", "perception: an edge that is not two vertices from 0 to 3"),
        ("[0, 1]", "perception: an edge that is not two vertices from 0 to 3"),
        ("0-1, 1-2", "perception: not valid JSON"),
        ('{"edges": []}', "perception: not a list of edges"),
    ],
)
def test_a_malformed_edge_list_scores_zero_with_its_reason(perception, reason):
    assert coloring(perception) == Score(parse_failure=reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('["a", "b", "a"]', "answer: not a list of 4 colors"),
        ('"abab"', "answer: not a list of 4 colors"),
        ('["a", "b", "a", 1]', "answer: a color that is not a letter a to z"),
        ('["a", "b", "a", ""]', "answer: a color that is not a letter a to z"),
        ('["a", "b", "a", "ab"]', "answer: a color that is not a letter a to z"),
        ('["a", "b", "a", ["b"]]', "answer: a color that is not a letter a to z"),
        ('["a", "b", "a", "é"]', "answer: a color that is not a letter a to z"),
        (r'["a", "b", "a", "\ud800"]', "answer: a color that is not a letter a to z"),
        ('{"0": "a", "1": "b", "2": "a"}', "answer: not the vertices 0 to 3"),
    ],
)
def test_a_malformed_coloring_scores_zero_with_its_reason(answer, reason):
    assert coloring(answer=answer) == Score(parse_failure=reason, **SAW_RIGHT)


PIECES = st.sampled_from([*TAGS, SEEN, GRID, EDGES, COLORS, "[", "]", ",", '"-"', "٣", "1e999", "\n"]) | st.text()


@patient
@given(st.lists(PIECES).map("".join))
def test_no_text_makes_the_score_raise_or_leave_its_range(completion):
    for task, problem, _, _ in TRUTHS:
        result = score(task, problem, completion)
        assert result.a == result.a_own == 0 or not result.parse_failure
        assert result.a_p in (0, 1)
        assert 0 <= result.a_p_graded <= 1
        assert (result.a_p == 1) == (result.a_p_graded == 1)


@patient
@given(PIECES, PIECES, PIECES)
def test_no_segment_makes_the_score_raise(perception, reasoning, answer):
    for task, problem, _, _ in TRUTHS:
        result = score(task, problem, compose(perception, reasoning, answer))
        assert isinstance(result, Score)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=20,
)


@patient
@given(json_values, json_values)
def test_no_json_value_makes_the_score_raise(perception, answer):
    for task, problem, _, _ in TRUTHS:
        score(task, problem, compose(json.dumps(perception), "", json.dumps(answer)))


@pytest.mark.parametrize(
    "text", [SEEN * 6000, "<" * 10**6, "<answer>" * 125_000, "[" * 10**6, "9" * 10**6, " " * 10**6]
)
def test_a_megabyte_is_scored_at_once(text):
    start = time.process_time()
    for completion in (text, compose(text, "", GRID), compose(SEEN, text, GRID), compose(SEEN, "", text)):
        result = score(SUDOKU, PUZZLE, completion)
        assert result.parse_failure or result == PERFECT  # long reasoning alone is no fault
    assert time.process_time() - start < 5


def test_a_hostile_9x9_perception_is_scored_at_once():
    task, problem = Sudoku(9, (14, 18)), Sudoku(9, (14, 18)).sample(Random(0))
    blank = json.dumps([["-"] * 9] * 9)
    start = time.process_time()
    assert score(task, problem, compose(blank, "", task.answer(problem))) == Score(
        a=1.0, a_p=0.0, a_p_graded=pytest.approx(sum(row.count(0) for row in problem) / 81), a_own=1.0
    )
    assert time.process_time() - start < 2


def test_read_gives_what_was_seen_and_answered():
    assert read(SUDOKU, PUZZLE, compose(SEEN, "", GRID)) == (PUZZLE, SOLUTION, "")
    assert read(SUDOKU, PUZZLE, "") == (None, None, "empty completion")
    assert read(SUDOKU, PUZZLE, compose(SEEN, "", "")) == (PUZZLE, None, "answer: not valid JSON")
