"""Graph coloring: 5–6 vertices on a CPU, 7–9 as published, one implementation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from math import cos, dist, pi, sin
from random import Random
from string import ascii_lowercase
from typing import Any, ClassVar

from PIL import Image

from asym.tasks.task import FINE, OPENERS, SO, Canvas, Drawing, Variation, is_int, read_json

MAX_VERTICES = len(ascii_lowercase)  # one letter per color, and the exact search stays instant
_NEAR = ("near", "by", "beside", "meets", "touches", "joins")


@dataclass(frozen=True)
class Graph:
    """A simple graph on the vertices 0 … n − 1; `edges` are (smaller, larger), sorted."""

    n: int
    edges: tuple[tuple[int, int], ...]

    @cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """The sorted neighbours of every vertex."""
        near = [[] for _ in range(self.n)]
        for u, v in self.edges:
            near[u].append(v)
            near[v].append(u)
        return tuple(tuple(sorted(vs)) for vs in near)


@dataclass(frozen=True)
class GraphColoring:
    """Color the vertices properly, with exactly as many colors as the graph needs.

    Args:
        vertices: (fewest, most) vertices.
    """

    vertices: tuple[int, int] = (5, 6)
    name: ClassVar[str] = "graph_coloring"

    def sample(self, rng: Random) -> Graph:
        """Uniform over the labelled graphs of a size, each pair an edge or not.

        There are only 2^10 graphs on 5 vertices, 2^15 on 6, 2^36 on 9. Sizes are drawn in proportion to their number
        of graphs up to 2^15, so that small graphs do not run out and large ones do not crowd them out.
        """
        sizes = range(self.vertices[0], self.vertices[1] + 1)
        (n,) = rng.choices(sizes, [2 ** min(k * (k - 1) // 2, 15) for k in sizes])
        return Graph(n, tuple(edge for edge in combinations(range(n), 2) if rng.random() < 0.5))

    def sample_scene(self, rng: Random) -> Graph:
        """Edges are independent coin tosses already: a problem is as unguessable as a scene can be."""
        return self.sample(rng)

    def draw(self, problem: Graph, drawing: Drawing, rng: Random) -> Image.Image:
        """Labelled discs joined by straight lines: on a circle when clean, displaced otherwise."""
        canvas = Canvas(drawing, rng)
        radius = min(0.11, 0.5 / problem.n)
        places = _layout(problem, drawing.layout, radius, rng)
        for u, v in problem.edges:
            canvas.line(places[u], places[v], 1.2)
        for vertex, place in enumerate(places):
            canvas.disc(place, radius)
            canvas.digit(str(vertex), place, radius * 1.8, radius * 1.5)
        return canvas.finish()

    def prompt(self, problem: Graph, style: str) -> str:
        """The question; "full" spells out rules and format for models that were not made for this study."""
        if style == "brief":
            return "Color the graph in the image."
        return (
            f"The image shows a graph with vertices 0 to {problem.n - 1}. Color every vertex so that no edge joins two "
            "vertices of the same color, using as few colors as possible, named a, b, c, …\nFirst write the edges you "
            "see as a sorted JSON list of pairs [u, v] with u < v between <perception> and </perception>. Then reason "
            "between <reasoning> and </reasoning>. Finally write a JSON list with the color of each vertex from 0 on "
            "between <answer> and </answer>."
        )

    def transcribe(self, problem: Graph) -> str:
        """The sorted edge list as JSON."""
        return json.dumps(problem.edges)

    def describe(self, problem: Graph) -> str:
        """The edges in words."""
        edges = [f"{u} to {v}" for u, v in problem.edges]
        return f"Color this graph of {problem.n}: " + ", ".join(edges or ["no edges"]) + "."

    def explain(self, problem: Graph, rng: Random, verbosity: int, variation: float) -> tuple[str, str]:
        """The colors a largest clique needs, then vertex by vertex the first free color; then the rounds."""
        choices = Variation(rng, variation)
        order, lines = _greedy_order(problem, choices), []
        colors: dict[int, str] = {}
        clique = choices.order(_largest_clique(problem))
        count = chromatic_number(problem)
        if len(clique) == count:
            lines.append(f"clique {' '.join(map(str, clique))}, {choices.pick(SO)} {count} colors.")
        else:  # an odd wheel, say: colors beyond the clique
            lines.append(f"clique {' '.join(map(str, clique))}, not enough, {choices.pick(SO)} {count} colors.")
        for vertex in order:
            waiting = [v for v in range(problem.n) if v not in colors and v != vertex]
            if waiting and choices.happens("look", 0.15):
                idle = _near(problem, choices.pick(waiting), colors, choices)
                lines.append(f"{choices.pick(OPENERS)} {idle}, {choices.pick(('later', 'not yet'))}.")
            used = {colors[v] for v in problem.neighbours[vertex] if v in colors}
            color = next(letter for letter in ascii_lowercase if letter not in used)
            line = f"{choices.pick(OPENERS)} {_near(problem, vertex, colors, choices)}"
            if used and choices.happens("slip", 0.06):  # a mistake, noticed and mended
                wrong = choices.pick(sorted(used))
                line += f", {choices.pick(SO)} {wrong}? no, near {wrong}"
            lines.append(f"{line}, {choices.pick(SO)} {vertex} {color}.")
            colors[vertex] = color
        for count in range(verbosity, 0, -1):  # down to 1: which round is the last must show
            lines.extend([f"round {count}.", *_verify(problem, colors, choices)])
        return " ".join(lines), json.dumps([colors[vertex] for vertex in range(problem.n)])

    def parse_perception(self, text: str, problem: Graph) -> Graph:
        """An edge list on the problem's vertices; order and direction are free, repeated edges are not."""
        return _check_graph(problem.n, read_json(text))

    def parse_answer(self, text: str, problem: Graph) -> tuple[str, ...]:
        """A color per vertex: a list, or an object from vertex to color."""
        answer = read_json(text)
        if isinstance(answer, dict):
            if sorted(answer) != sorted(map(str, range(problem.n))):
                raise ValueError(f"not the vertices 0 to {problem.n - 1}")
            answer = [answer[str(vertex)] for vertex in range(problem.n)]
        if not isinstance(answer, list) or len(answer) != problem.n:
            raise ValueError(f"not a list of {problem.n} colors")
        if any(not isinstance(color, str) or len(color) != 1 or color not in ascii_lowercase for color in answer):
            raise ValueError("a color that is not a letter a to z")
        return tuple(answer)

    def solves(self, answer: tuple[str, ...], problem: Graph) -> bool:
        """Proper, and with exactly the chromatic number of colors."""
        proper = all(answer[u] != answer[v] for u, v in problem.edges)
        return proper and len(set(answer)) == chromatic_number(problem)

    def similarity(self, seen: Graph, other: Graph) -> float:
        """F1 over edges; two graphs without edges agree."""
        a, b = set(seen.edges), set(other.edges)
        return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0

    def solve(self, seen: Graph) -> tuple[str, ...]:
        """An optimal coloring; every graph has one."""
        return tuple(ascii_lowercase[color] for color in optimal_coloring(seen))

    def answer(self, problem: Graph) -> str:
        """A correct answer as JSON."""
        return json.dumps(self.solve(problem))

    def valid(self, seen: Graph) -> bool:
        """True: what parses is a simple graph on the right vertices, and that is all a graph must be."""
        return True

    def ground_truth(self, problem: Graph) -> str:
        """Published form: vertices `v`, chromatic number `c`, edges."""
        return json.dumps({"v": problem.n, "c": chromatic_number(problem), "edges": problem.edges})

    def problem(self, ground_truth: Any) -> Graph:
        """The graph of a published row. Raises ValueError on anything else, a wrong chromatic number included."""
        row = read_json(ground_truth) if isinstance(ground_truth, str) else ground_truth
        if not isinstance(row, dict) or not {"v", "edges"} <= set(row):
            raise ValueError("ground_truth is not an object with v, c, edges")
        if not is_int(row["v"]) or not 1 <= row["v"] <= MAX_VERTICES:
            raise ValueError(f"ground_truth: v is not a number from 1 to {MAX_VERTICES}")
        graph = _check_graph(row["v"], row["edges"])
        if row.get("c", chromatic_number(graph)) != chromatic_number(graph):
            raise ValueError(f"ground_truth: the chromatic number is {chromatic_number(graph)}, not c")
        return graph


def _check_graph(n: int, edges: Any) -> Graph:
    if not isinstance(edges, list | tuple):
        raise ValueError("not a list of edges")
    seen = set()
    for edge in edges:
        if not isinstance(edge, list | tuple) or len(edge) != 2 or not all(is_int(v) and 0 <= v < n for v in edge):
            raise ValueError(f"an edge that is not two vertices from 0 to {n - 1}")
        u, v = sorted(edge)
        if u == v:
            raise ValueError("an edge from a vertex to itself")
        if (u, v) in seen:
            raise ValueError("an edge given twice")
        seen.add((u, v))
    return Graph(n, tuple(sorted(seen)))


@lru_cache(maxsize=100_000)
def optimal_coloring(graph: Graph) -> tuple[int, ...]:
    """A proper coloring (colors 0, 1, …) with the chromatic number of colors: exact branch and bound.

    Colors the vertex with most distinct neighbouring colors first (DSATUR: Brélaz, 1979); a color never used before is
    tried once, as all of them are alike.
    """
    best: list[int] = list(range(graph.n))
    colors: list[int | None] = [None] * graph.n
    lower = len(_largest_clique(graph))

    def extend(used: int) -> bool:  # True: proven optimal
        nonlocal best
        if used >= max(best) + 1:
            return False
        open_vertices = [v for v in range(graph.n) if colors[v] is None]
        if not open_vertices:
            best = list(colors)
            return used == lower
        near = {v: {colors[u] for u in graph.neighbours[v]} - {None} for v in open_vertices}
        vertex = max(open_vertices, key=lambda v: (len(near[v]), len(graph.neighbours[v])))
        for color in range(used + 1):
            if color not in near[vertex]:
                colors[vertex] = color
                if extend(max(used, color + 1)):
                    return True
                colors[vertex] = None
        return False

    extend(0)
    return tuple(best)


def chromatic_number(graph: Graph) -> int:
    """The least number of colors of a proper coloring, proven."""
    return max(optimal_coloring(graph)) + 1


@lru_cache(maxsize=100_000)
def _largest_clique(graph: Graph) -> tuple[int, ...]:
    best: tuple[int, ...] = ()

    def grow(clique: tuple[int, ...], candidates: tuple[int, ...]) -> None:
        nonlocal best
        if len(clique) > len(best):
            best = clique
        for k, vertex in enumerate(candidates):
            if len(clique) + len(candidates) - k <= len(best):
                return
            grow((*clique, vertex), tuple(v for v in candidates[k + 1 :] if v in graph.neighbours[vertex]))

    grow((), tuple(range(graph.n)))
    return best


def _greedy_order(graph: Graph, choices: Variation) -> list[int]:
    """An order in which taking the first free color is optimal; canonically that of the labels, if it is."""
    optimal = optimal_coloring(graph)
    order = choices.order(range(graph.n))
    for _ in range(200 if choices.variation else 1):
        if _first_fit(graph, order) == max(optimal) + 1:
            return order
        order = choices.rng.sample(order, graph.n)
    # Taking the classes of an optimal coloring one after the other always works.
    return sorted(range(graph.n), key=lambda v: optimal[v])


def _first_fit(graph: Graph, order: list[int]) -> int:
    colors: dict[int, int] = {}
    for vertex in order:
        used = {colors[v] for v in graph.neighbours[vertex] if v in colors}
        colors[vertex] = next(color for color in range(graph.n) if color not in used)
    return max(colors.values()) + 1


def _near(graph: Graph, vertex: int, colors: dict[int, str], choices: Variation) -> str:
    """A vertex with its neighbours and the colors they have so far."""
    near = [f"{v} {colors.get(v, '-')}" for v in choices.order(graph.neighbours[vertex])]
    return f"{vertex}: {choices.pick(_NEAR)} {' '.join(near) or 'none'}"


def _verify(graph: Graph, colors: dict[int, str], choices: Variation) -> Iterator[str]:
    """Every vertex and every edge of the coloring, in order: which comes next is plain, how it is said varies."""
    said = [f"{_near(graph, vertex, colors, choices)}, {vertex} {colors[vertex]}" for vertex in range(graph.n)]
    said += [f"{u} {v}: {colors[u]} {colors[v]}" for u, v in graph.edges]
    for text in said:
        yield f"{choices.pick(OPENERS)} {text}, {choices.pick(FINE)}."


def _layout(graph: Graph, displacement: float, radius: float, rng: Random) -> list[tuple[float, float]]:
    """Places of the vertices: on a circle, turned and displaced by up to `displacement`.

    Drawn again until no node covers another and no edge runs through a node that is not its end: the image must show
    the graph, whatever its difficulty. Displacement shrinks if that does not succeed.
    """
    reach = 0.5 - radius - 0.02
    turn = rng.uniform(-pi, pi) * min(1, 4 * displacement)
    circle = [turn + 2 * pi * k / graph.n - pi / 2 for k in range(graph.n)]
    clamp = lambda x: min(max(x, radius + 0.01), 1 - radius - 0.01)  # noqa: E731
    for attempt in range(1000):
        shift = displacement * (1 - attempt / 1000)
        moved = lambda: rng.uniform(-shift, shift)  # noqa: E731, B023
        places = [(clamp(0.5 + reach * cos(a) + moved()), clamp(0.5 + reach * sin(a) + moved())) for a in circle]
        if _readable(graph, places, radius):
            break
    return places


def _readable(graph: Graph, places: list[tuple[float, float]], radius: float) -> bool:
    if any(dist(a, b) < 2.3 * radius for a, b in combinations(places, 2)):
        return False
    for u, v in graph.edges:
        (x, y), (x2, y2) = places[u], places[v]
        dx, dy, length = x2 - x, y2 - y, dist(places[u], places[v])
        for w, (px, py) in enumerate(places):
            along = ((px - x) * dx + (py - y) * dy) / length**2
            if w not in (u, v) and 0 < along < 1 and abs((px - x) * dy - (py - y) * dx) / length < 1.25 * radius:
                return False
    return True
