import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, count, pairwise, permutations, product
from pathlib import Path
from random import Random

import gcol
import networkx as nx
import numpy as np
import pytest
from scipy.stats import chisquare

from asym.scoring import score
from asym.tasks import Drawing, GraphColoring, Sudoku, get_task
from asym.tasks.graph_coloring import Graph, _layout, chromatic_number, optimal_coloring
from asym.tasks.sudoku import _UNITS, _all_solutions_4x4, _random_solution, solutions, units
from asym.tasks.task import Canvas
from asym.transcript import compose

PUBLISHED = json.loads((Path(__file__).parent / "published_rows.json").read_text())
CPU = (Sudoku(), GraphColoring())
TASKS = (*CPU, Sudoku(9, (14, 18)), GraphColoring((7, 9)))
IDS = ("sudoku 4x4", "graph 5-6", "sudoku 9x9", "graph 7-9")
all_tasks = pytest.mark.parametrize("task", TASKS, ids=IDS)
cpu_tasks = pytest.mark.parametrize("task", CPU, ids=IDS[:2])
EMPTY = ((0,) * 4,) * 4


def some(task, count: int, stream: str = "") -> list:
    rng = Random(f"{task}{stream}")
    return [task.sample(rng) for _ in range(count)]


def graphs(n: int) -> list[Graph]:
    """All labelled graphs on n vertices."""
    pairs = list(combinations(range(n), 2))
    return [Graph(n, edges) for size in range(len(pairs) + 1) for edges in combinations(pairs, size)]


def as_networkx(graph: Graph) -> nx.Graph:
    result = nx.empty_graph(graph.n)
    result.add_edges_from(graph.edges)
    return result


# Sampling


def test_a_sudoku_has_the_asked_number_of_blanks_and_one_solution():
    for task in (Sudoku(4, (5, 8)), Sudoku(9, (14, 18))):
        blanks = Counter()
        for grid in some(task, 60):
            blanks[sum(row.count(0) for row in grid)] += 1
            assert len(solutions(grid, 2)) == 1
        assert set(blanks) == set(range(task.blanks[0], task.blanks[1] + 1))


def test_a_graph_has_an_asked_number_of_vertices():
    assert {graph.n for graph in some(GraphColoring((7, 9)), 60)} == {7, 8, 9}


def test_full_4x4_grids_are_uniform_over_all_288():
    brute = [
        grid
        for grid in product(permutations(range(1, 5)), repeat=4)
        if all(len({grid[r][c] for r, c in unit}) == 4 for unit in units(4))
    ]
    assert len(brute) == 288
    assert set(_all_solutions_4x4()) == set(brute)
    rng = Random(0)
    counts = Counter(_random_solution(4, rng) for _ in range(288 * 20))
    assert chisquare([counts[grid] for grid in brute]).pvalue > 0.01


def test_blanks_are_uniform_over_the_cells():
    flat = [sum(grid, ()) for grid in some(Sudoku(4, (1, 1)), 1600)]  # one blank always leaves one solution
    places = Counter(cells.index(0) for cells in flat)
    assert len(places) == 16
    assert chisquare(list(places.values())).pvalue > 0.01


def test_full_9x9_grids_repeat_no_pattern():
    rng = Random(0)
    grids = [_random_solution(9, rng) for _ in range(40)]
    assert len({grid[0] for grid in grids}) == 40
    assert len({grid[8][8] for grid in grids}) > 5


def test_graphs_on_four_vertices_are_uniform():
    counts = Counter(some(GraphColoring((4, 4)), 64 * 30))
    assert set(counts) == set(graphs(4))
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_sizes_are_drawn_in_proportion_to_their_number_of_graphs():
    sizes = Counter(graph.n for graph in some(GraphColoring((4, 5)), 4000))
    assert chisquare([sizes[4], sizes[5]], [4000 / 17, 4000 * 16 / 17]).pvalue > 0.01


def test_graphs_that_greedy_colors_badly_are_drawn():
    in_order = lambda graph, _: list(graph)  # noqa: E731
    greedy = lambda graph: 1 + max(nx.greedy_color(as_networkx(graph), in_order).values())  # noqa: E731
    assert any(chromatic_number(graph) < greedy(graph) for graph in some(GraphColoring((7, 9)), 100))


def test_scene_cells_are_independent_of_one_another():
    rng = Random(0)
    scenes = np.array([Sudoku().sample_scene(rng) for _ in range(3000)]).reshape(3000, 16)
    counts = np.array([(scenes == digit).sum() for digit in range(5)])
    blank = 6.5 / 16
    assert chisquare(counts, np.array([blank, *[(1 - blank) / 4] * 4]) * scenes.size).pvalue > 0.01
    assert np.abs(np.corrcoef(scenes.T) - np.eye(16)).max() < 0.1  # in a Sudoku, cells of a unit exclude each other


@all_tasks
def test_the_same_stream_gives_the_same_problems(task):
    assert some(task, 5) == some(task, 5)
    assert some(task, 5) != some(task, 5, "another")


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'chess': allowed are sudoku, graph_coloring"):
        get_task("chess")


# Solving


def test_sudoku_solver_finds_exactly_the_completions_brute_force_finds():
    rng = Random(0)
    for _ in range(60):
        full = rng.choice(_all_solutions_4x4())
        grid = tuple(tuple(x if rng.random() < 0.25 else 0 for x in row) for row in full)
        agrees = lambda other: all(g in (0, x) for gs, xs in zip(grid, other) for g, x in zip(gs, xs))  # noqa: B023, B905, E731
        assert sorted(solutions(grid, 288)) == sorted(filter(agrees, _all_solutions_4x4()))


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        ({}, 2),
        ({(0, 0): 1, (0, 3): 1}, 0),  # clash in a row
        ({(0, 0): 1, (3, 0): 1}, 0),  # in a column
        ({(0, 0): 1, (1, 1): 1}, 0),  # in a box
        ({(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 3): 4}, 0),  # no digit left, without a clash
    ],
)
def test_a_grid_is_valid_only_with_exactly_one_solution(cells, found):
    grid = tuple(tuple(cells.get((r, c), 0) for c in range(4)) for r in range(4))
    assert len(solutions(grid, 2)) == found
    assert not Sudoku().valid(grid)
    assert (Sudoku().solve(grid) is None) == (found == 0)


def test_the_solver_gives_up_on_a_9x9_grid_that_would_take_forever():
    # Norvig's "hardest" grid has no solution; plain search takes minutes to find that out
    text = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    cells = [int(x) if x != "." else 0 for x in text]
    grid = tuple(tuple(cells[9 * r : 9 * r + 9]) for r in range(9))
    assert solutions(grid, 1) in (None, [])
    assert Sudoku(9).solve(grid) is None
    assert not Sudoku(9).valid(grid)


def test_chromatic_number_is_brute_forced_on_every_graph_of_four_vertices():
    for graph in graphs(4):
        fewest = min(
            len(set(colors))
            for colors in product(range(4), repeat=4)
            if all(colors[u] != colors[v] for u, v in graph.edges)
        )
        assert chromatic_number(graph) == fewest


def test_chromatic_number_agrees_with_gcol():
    wheels = [Graph(n, tuple(sorted(map(lambda e: tuple(sorted(e)), nx.wheel_graph(n).edges)))) for n in range(5, 10)]  # noqa: C417
    for graph in [*some(GraphColoring((5, 6)), 100), *some(GraphColoring((7, 9)), 100), *wheels]:
        colors = optimal_coloring(graph)
        assert all(colors[u] != colors[v] for u, v in graph.edges)
        assert chromatic_number(graph) == gcol.chromatic_number(as_networkx(graph))
        assert set(colors) == set(range(chromatic_number(graph)))


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_chromatic_number_stays_instant_at_the_largest_size(density):
    rng = Random(0)
    for _ in range(3):
        graph = Graph(26, tuple(e for e in combinations(range(26), 2) if rng.random() < density))
        assert chromatic_number(graph) == gcol.chromatic_number(as_networkx(graph))


@all_tasks
def test_the_answer_solves_the_problem_and_a_changed_one_does_not(task):
    for problem in some(task, 20):
        answer = task.parse_answer(task.answer(problem), problem)
        assert answer == task.solve(problem)
        assert task.solves(answer, problem)
        if task.name == "sudoku":
            n = len(problem)
            swap = {1: 2, 2: 1}
            assert not task.solves(tuple(tuple(swap.get(x, x) for x in row) for row in answer), problem)  # givens
            assert not task.solves(((answer[0][0] % n + 1, *answer[0][1:]), *answer[1:]), problem)
        else:
            assert task.solves(tuple("xyzuvwabc"["abcdefghi".index(x)] for x in answer), problem)
            if problem.edges:
                assert not task.solves(("a",) * problem.n, problem)
            if chromatic_number(problem) < problem.n:
                assert not task.solves(tuple("abcdefghi"[: problem.n]), problem)  # proper, too many colors


# Texts


@all_tasks
def test_perception_and_ground_truth_round_trip(task):
    for problem in some(task, 30):
        assert task.parse_perception(task.transcribe(problem), problem) == problem
        assert task.problem(task.ground_truth(problem)) == problem
        assert task.problem(json.loads(task.ground_truth(problem))) == problem
        assert hash(task.problem(task.ground_truth(problem))) == hash(problem)
        assert task.similarity(problem, problem) == 1
        assert task.valid(problem)


def test_the_canonical_texts_are_those_of_the_published_data():
    puzzle = ((0, 2, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 0))
    assert Sudoku().transcribe(puzzle) == '[["-", 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, "-"]]'
    assert Sudoku().ground_truth(puzzle) == "[[0, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]]"
    path = Graph(3, ((0, 1), (1, 2)))
    assert GraphColoring().transcribe(path) == "[[0, 1], [1, 2]]"
    assert GraphColoring().ground_truth(path) == '{"v": 3, "c": 2, "edges": [[0, 1], [1, 2]]}'


def test_similarity_is_the_share_of_cells_and_f1_over_edges():
    seen, other = EMPTY, ((1, 2, 0, 0), *EMPTY[1:])
    assert Sudoku().similarity(seen, other) == 14 / 16
    square = Graph(4, ((0, 1), (0, 3), (1, 2), (2, 3)))
    half = Graph(4, ((0, 1), (0, 2)))  # precision 1/2, recall 1/4
    assert GraphColoring().similarity(half, square) == pytest.approx(2 * (1 / 2 * 1 / 4) / (1 / 2 + 1 / 4))
    assert GraphColoring().similarity(Graph(4, ()), square) == 0
    assert GraphColoring().similarity(Graph(4, ()), Graph(4, ())) == 1


@all_tasks
def test_the_words_tell_the_whole_problem(task):
    """Rebuilt from the description alone: the language stage asks nothing that cannot be known."""
    for problem in some(task, 20):
        head, body = task.describe(problem).removesuffix(".").split(": ", 1)
        if task.name == "sudoku":
            rows = [row.split(": ")[1].split() for row in body.split(", ")]
            assert tuple(tuple(0 if cell == "-" else int(cell) for cell in row) for row in rows) == problem
        else:
            edges = [tuple(map(int, edge.split(" to "))) for edge in body.split(", ") if " to " in edge]
            assert Graph(int(head.split()[-1]), tuple(edges)) == problem


@all_tasks
def test_the_full_prompt_names_the_rules_and_tags_and_the_brief_one_tells_nothing_of_the_problem(task):
    one, other = some(task, 2)
    assert task.prompt(one, "brief") == task.prompt(other, "brief")
    assert all(f"<{tag}>" in task.prompt(one, "full") for tag in ("perception", "reasoning", "answer"))


@pytest.mark.parametrize("name", ["sudoku", "graph_coloring"])
def test_published_rows_load_solve_and_score(name):
    task = get_task(name)
    problem = task.problem(PUBLISHED[name])
    assert json.loads(task.ground_truth(problem)) == json.loads(PUBLISHED[name])
    answer = task.parse_answer(task.answer(problem), problem)
    assert task.solves(answer, problem)
    reasoning, answer = task.explain(problem, Random(0), 1, 1.0)
    result = score(task, problem, compose(task.transcribe(problem), reasoning, answer))
    assert (result.a, result.a_p, result.a_p_graded, result.a_own, result.parse_failure) == (1, 1, 1, 1, "")


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("sudoku", "[[1]]", "4 or 9 rows"),
        ("sudoku", str([[1, 1, 0, 0]] + [[0] * 4] * 3), "no solution"),
        ("sudoku", str([[5, 0, 0, 0]] + [[0] * 4] * 3), "no digit or blank"),
        ("sudoku", str([[True, 0, 0, 0]] + [[0] * 4] * 3).lower(), "no digit or blank"),
        ("sudoku", "5", "4 or 9 rows"),
        ("sudoku", "nope", "not valid JSON"),
        ("graph_coloring", '{"v": 3, "c": 2, "edges": [[0, 1], [1, 2], [0, 2]]}', "chromatic number is 3, not c"),
        ("graph_coloring", '{"v": 0, "edges": []}', "v is not a number from 1 to 26"),
        ("graph_coloring", '{"v": 2.0, "edges": []}', "v is not a number from 1 to 26"),
        ("graph_coloring", '{"v": 2, "edges": [[0, 2]]}', "two vertices from 0 to 1"),
        ("graph_coloring", '{"v": 2, "edges": [[0, 1], [1, 0]]}', "an edge given twice"),
        ("graph_coloring", '{"v": 2, "edges": [[1, 1]]}', "from a vertex to itself"),
        ("graph_coloring", '{"v": 2}', "not an object with v, c, edges"),
    ],
)
def test_a_broken_ground_truth_is_refused_with_its_reason(name, row, why):
    with pytest.raises(ValueError, match=why):
        get_task(name).problem(row)


# The chain of thought


@all_tasks
@pytest.mark.parametrize("variation", [0.0, 0.5, 1.0])
def test_every_trace_ends_in_an_answer_that_solves(task, variation):
    for k, problem in enumerate(some(task, 12)):
        reasoning, answer = task.explain(problem, Random(k), k % 9, variation)
        assert task.solves(task.parse_answer(answer, problem), problem)
        assert "<" not in reasoning


@all_tasks
@pytest.mark.parametrize("variation", [0.0, 1.0])
def test_verbosity_lengthens_at_equal_content(task, variation):
    for k, problem in enumerate(some(task, 5)):
        traces = [task.explain(problem, Random(k), verbosity, variation) for verbosity in range(9)]
        words = [re.sub(r"round \d+", "round", reasoning).split() for reasoning, _ in traces]
        assert all(len(short) < len(long) for short, long in pairwise(words))
        assert len({answer for _, answer in traces}) == 1
        for short, long in pairwise(words):
            rest = iter(long)
            assert all(word in rest for word in short)  # the shorter trace is left when words are taken away


def rounds_of(task, problem, k: int, variation: float) -> tuple[tuple, list[str]]:
    """The solution that a trace arrives at, and its three rounds of verification."""
    reasoning, answer = task.explain(problem, Random(k), 3, variation)
    first, *rounds = re.split(r" round \d+\. ", reasoning)
    assert first == task.explain(problem, Random(k), 0, variation)[0]
    assert re.findall(r"round \d+", reasoning) == ["round 3", "round 2", "round 1"]
    assert len(rounds) == 3
    return task.parse_answer(answer, problem), rounds


@pytest.mark.parametrize("variation", [0.0, 1.0])
@pytest.mark.parametrize("task", TASKS[::2], ids=IDS[::2])
def test_every_round_of_a_sudoku_verifies_every_unit_once(task, variation):
    names = {word: kind for kind, words in _UNITS.items() for word in words}
    n = task.size
    blocks = {kind: units(n)[k * n : (k + 1) * n] for k, kind in enumerate(_UNITS)}
    for k, problem in enumerate(some(task, 10)):
        solution, rounds = rounds_of(task, problem, k, variation)
        held = {
            (kind, index + 1): [solution[r][c] for r, c in unit]
            for kind, block in blocks.items()
            for index, unit in enumerate(block)
        }
        for lines in rounds:
            stated = re.findall(r"([a-z]+) (\d+): ([\d ]+),", lines)
            assert len(stated) == 3 * n
            assert {(names[word], int(at)): [int(d) for d in digits.split()] for word, at, digits in stated} == held


@pytest.mark.parametrize("variation", [0.0, 1.0])
@pytest.mark.parametrize("task", TASKS[1::2], ids=IDS[1::2])
def test_every_round_of_a_coloring_verifies_every_vertex_and_edge_once(task, variation):
    for k, graph in enumerate(some(task, 10)):
        solution, rounds = rounds_of(task, graph, k, variation)
        for lines in rounds:
            edges = re.findall(r"(\d+) (\d+): ([a-z]) ([a-z]),", lines)
            assert sorted((int(u), int(v)) for u, v, *_ in edges) == list(graph.edges)
            assert all((solution[int(u)], solution[int(v)]) == (a, b) for u, v, a, b in edges)
            vertices = re.findall(r"(\d+): [a-z]+((?: \d+ [a-z])+| none), (\d+) ([a-z]),", lines)
            assert sorted(int(v) for v, *_ in vertices) == list(range(graph.n))
            for vertex, near, again, color in vertices:
                assert (again, solution[int(vertex)]) == (vertex, color)
                neighbours = {(int(u), c) for u, c in re.findall(r"(\d+) ([a-z])", near)}
                assert neighbours == {(u, solution[u]) for u in graph.neighbours[int(vertex)]}


@all_tasks
def test_without_variation_a_problem_has_one_trace(task):
    for problem in some(task, 10):
        assert len({task.explain(problem, Random(k), 1, 0.0) for k in range(5)}) == 1
    problem = some(task, 1)[0]
    assert len({task.explain(problem, Random(k), 1, 1.0) for k in range(5)}) == 5


@all_tasks
def test_variation_leaves_the_mean_length_about_equal(task):
    problems = some(task, 150)
    means = []
    for variation in (0.0, 1.0):
        traces = [task.explain(problem, Random(k), 1, variation)[0] for k, problem in enumerate(problems)]
        means.append(np.mean([len(trace.split()) for trace in traces]))
    assert means[0] == pytest.approx(means[1], rel=0.06)


@pytest.mark.parametrize("variation", [0.0, 1.0])
def test_a_sudoku_trace_states_only_what_is_so(variation):
    """Followed step by step: every row, column and box named holds what it says, every digit is the solution's."""
    task, kinds = Sudoku(), {word: kind for kind, words in _UNITS.items() for word in words}
    for k, problem in enumerate(some(task, 20)):
        solution, cells = task.solve(problem), [list(row) for row in problem]
        for line in re.findall(r"r\dc\d: [^.]*", task.explain(problem, Random(k), 0, variation)[0]):
            r, c = int(line[1]) - 1, int(line[3]) - 1
            box = [cells[i][j] for i, j in product(range(4), range(4)) if (i // 2, j // 2) == (r // 2, c // 2)]
            held = {"row": cells[r], "column": [row[c] for row in cells], "box": box}
            stated = re.findall(r"([a-z]+)((?: [\d-])+)(?:,|$)", ",".join(line.split(",")[:3]))
            assert {kinds[word]: text.replace("-", "0").split() for word, text in stated} == {
                kind: list(map(str, unit)) for kind, unit in held.items()
            }
            if placed := re.search(rf" {line[:4]} (\d)$", line):
                assert int(placed[1]) == solution[r][c]
                cells[r][c] = solution[r][c]
        assert tuple(map(tuple, cells)) == solution


# Drawing


@all_tasks
@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_drawings_are_a_function_of_problem_difficulty_and_stream(task, difficulty):
    one, other = some(task, 2)
    drawing = Drawing.at(difficulty, 64)
    image = task.draw(one, drawing, Random(3))
    assert (image.size, image.mode) == ((64, 64), "RGB")
    assert image.tobytes() == task.draw(one, drawing, Random(3)).tobytes()
    assert image.tobytes() != task.draw(other, drawing, Random(3)).tobytes()
    assert (image.tobytes() == task.draw(one, drawing, Random(4)).tobytes()) == (difficulty == 0)


@cpu_tasks
def test_harder_drawings_are_further_from_clean_ones(task):
    def distance(difficulty: float) -> float:
        pixels = [
            [np.asarray(task.draw(problem, Drawing.at(d, 64), Random(k)), float) for d in (0.0, difficulty)]
            for k, problem in enumerate(some(task, 20))
        ]
        return np.mean([np.abs(clean - hard).mean() for clean, hard in pixels])

    distances = [distance(d) for d in (0.0, 0.3, 0.6, 1.0)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert distances[1] > 1


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("part", "least"), [("line", 0.3), ("digit", 0.5)])
def test_every_edge_and_every_label_shows(part, least, difficulty):
    """Leaving one out changes some pixel by a good share of the contrast (noise set aside): nothing is hidden."""
    for task, size in ((GraphColoring(), 64), (GraphColoring((7, 9)), 448)):
        drawing = replace(Drawing.at(difficulty, size), noise=0.0)
        for stream, graph in enumerate(some(task, 8)):
            whole = np.asarray(task.draw(graph, drawing, Random(stream)), float)
            for index in range(len(graph.edges) if part == "line" else graph.n):
                change = np.abs(whole - draw_without(part, index, task, graph, drawing, Random(stream)))
                assert change.max() > least * 255 * drawing.contrast, (graph, index)


def draw_without(part: str, index: int, task, graph: Graph, drawing: Drawing, rng: Random) -> np.ndarray:
    """The drawing as if the `index`-th call of `Canvas.<part>` had left no trace, everything else in its place."""
    method, calls = getattr(Canvas, part), count()

    def draw(canvas, *arguments):
        before = canvas._image.copy()
        method(canvas, *arguments)
        if next(calls) == index:
            canvas._image.paste(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canvas, part, draw)
        return np.asarray(task.draw(graph, drawing, rng), float)


@pytest.mark.parametrize("displacement", [0.0, 0.11, 0.22])
def test_no_node_hides_another_nor_lies_on_a_foreign_edge(displacement):
    for stream, graph in enumerate(some(GraphColoring((5, 9)), 60)):
        radius = min(0.11, 0.5 / graph.n)
        places = [complex(*place) for place in _layout(graph, displacement, radius, Random(stream))]
        assert all(radius < x < 1 - radius for place in places for x in (place.real, place.imag))
        assert all(abs(a - b) > 2 * radius for a, b in combinations(places, 2))
        for u, v in graph.edges:
            on_edge = [places[u] + t * (places[v] - places[u]) for t in np.linspace(0, 1, 50)]
            others = (place for w, place in enumerate(places) if w not in (u, v))
            assert all(abs(place - point) > radius for place in others for point in on_edge)
