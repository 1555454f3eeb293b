"""Sudoku: 4×4 on a CPU, 9×9 as published, one implementation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import isqrt
from random import Random
from typing import Any, ClassVar

from PIL import Image

from asym.tasks.task import FINE, OPENERS, SO, Canvas, Drawing, Variation, is_int, read_json

Grid = tuple[tuple[int, ...], ...]  # 0 is a blank

SEARCH_BUDGET = 20_000  # cells tried; real puzzles take a few hundred, a hostile "perception" must not take forever
_UNITS = {"row": ("row", "line", "across"), "column": ("column", "down", "file"), "box": ("box", "block", "square")}


@dataclass(frozen=True)
class Sudoku:
    """Fill the grid: every row, column and box holds each digit once.

    Args:
        size: digits per row, 4 or 9.
        blanks: (fewest, most) blanks; their number is uniform in between.
    """

    size: int = 4
    blanks: tuple[int, int] = (5, 8)
    name: ClassVar[str] = "sudoku"

    def sample(self, rng: Random) -> Grid:
        """A puzzle with exactly one solution: a random full grid, then random blanks, drawn again until unique."""
        while True:
            cells = [list(row) for row in _random_solution(self.size, rng)]
            places = [(r, c) for r in range(self.size) for c in range(self.size)]
            for r, c in rng.sample(places, rng.randint(*self.blanks)):
                cells[r][c] = 0
            grid = _freeze(cells)
            if len(solutions(grid, 2) or ()) == 1:
                return grid

    def sample_scene(self, rng: Random) -> Grid:
        """Independent random cells, as many blank as in puzzles: no cell can be told from the others."""
        blank = sum(self.blanks) / 2 / self.size**2
        cell = lambda: 0 if rng.random() < blank else rng.randint(1, self.size)  # noqa: E731
        return tuple(tuple(cell() for _ in range(self.size)) for _ in range(self.size))

    def draw(self, problem: Grid, drawing: Drawing, rng: Random) -> Image.Image:
        """The partly filled grid, box borders heavier than the others."""
        canvas, n, box = Canvas(drawing, rng), len(problem), isqrt(len(problem))
        margin = 0.03
        cell = (1 - 2 * margin) / n
        for k in range(n + 1):
            at, weight = margin + k * cell, 1.6 if k % box == 0 else 0.7
            canvas.line((at, margin), (at, 1 - margin), weight)
            canvas.line((margin, at), (1 - margin, at), weight)
        for r, row in enumerate(problem):
            for c, digit in enumerate(row):
                if digit:
                    centre = (margin + (c + 0.5) * cell, margin + (r + 0.5) * cell)
                    canvas.digit(str(digit), centre, cell * 0.95, cell * 0.72)
        return canvas.finish()

    def prompt(self, problem: Grid, style: str) -> str:
        """The question; "full" spells out rules and format for models that were not made for this study."""
        if style == "brief":
            return "Solve the sudoku in the image."
        n, box = len(problem), isqrt(len(problem))
        return (
            f"The image shows a {n}x{n} Sudoku. Fill the blanks so that each row, each column and each {box}x{box} box "
            f"contains every digit from 1 to {n} exactly once.\nFirst write the puzzle you see as a JSON list of rows, "
            'with "-" for a blank, between <perception> and </perception>. Then reason between <reasoning> and '
            "</reasoning>. Finally write the completed grid as a JSON list of rows between <answer> and </answer>."
        )

    def transcribe(self, problem: Grid) -> str:
        """The grid as JSON rows, "-" for a blank, as the published prompts ask."""
        return json.dumps([[digit or "-" for digit in row] for row in problem])

    def describe(self, problem: Grid) -> str:
        """The grid in words, row by row."""
        rows = [" ".join(["row", f"{r + 1}:", *(str(digit or "-") for digit in row)]) for r, row in enumerate(problem)]
        return "Solve this sudoku: " + ", ".join(rows) + "."

    def explain(self, problem: Grid, rng: Random, verbosity: int, variation: float) -> tuple[str, str]:
        """Cell by cell: what its row, column and box already hold, and the digit that is left; then the rounds."""
        return _Trace(problem, Variation(rng, variation), verbosity).write()

    def parse_perception(self, text: str, problem: Grid) -> Grid:
        """A grid of the problem's size with blanks."""
        return _parse_grid(text, len(problem), blank="-")

    def parse_answer(self, text: str, problem: Grid) -> Grid:
        """A full grid of the problem's size."""
        return _parse_grid(text, len(problem), blank=None)

    def solves(self, answer: Grid, problem: Grid) -> bool:
        """Every given kept, every unit complete."""
        digits = set(range(1, len(problem) + 1))
        kept = all(g in (0, a) for gs, xs in zip(problem, answer, strict=True) for g, a in zip(gs, xs, strict=True))
        return kept and all({answer[r][c] for r, c in unit} == digits for unit in units(len(problem)))

    def similarity(self, seen: Grid, other: Grid) -> float:
        """Share of cells that agree, blanks included."""
        pairs = [a == b for row, row_ in zip(seen, other, strict=True) for a, b in zip(row, row_, strict=True)]
        return sum(pairs) / len(pairs)

    def solve(self, seen: Grid) -> Grid | None:
        """A solution, or None when there is none or the search runs out of its budget."""
        return next(iter(solutions(seen, 1) or ()), None)

    def answer(self, problem: Grid) -> str:
        """A correct answer as JSON."""
        return json.dumps(self.solve(problem))

    def valid(self, seen: Grid) -> bool:
        """No clash, and exactly one solution."""
        return len(solutions(seen, 2) or ()) == 1

    def ground_truth(self, problem: Grid) -> str:
        """Published form: rows of digits, 0 for a blank."""
        return json.dumps(problem)

    def problem(self, ground_truth: Any) -> Grid:
        """The puzzle of a published row. Raises ValueError unless it is a 4×4 or 9×9 grid with a solution."""
        grid = read_json(ground_truth) if isinstance(ground_truth, str) else ground_truth
        if not isinstance(grid, list | tuple) or len(grid) not in (4, 9):
            raise ValueError("ground_truth is not a list of 4 or 9 rows")
        grid = _check_grid(grid, len(grid), blank=0)
        if not solutions(grid, 1):
            raise ValueError("ground_truth has no solution")
        return grid


def _freeze(cells) -> Grid:
    return tuple(tuple(row) for row in cells)


def _parse_grid(text: str, n: int, blank: Any) -> Grid:
    return _check_grid(read_json(text), n, blank)


def _check_grid(grid: Any, n: int, blank: Any) -> Grid:
    if not isinstance(grid, list | tuple) or len(grid) != n:
        raise ValueError(f"not a list of {n} rows")
    if any(not isinstance(row, list | tuple) or len(row) != n for row in grid):
        raise ValueError(f"a row without {n} cells")
    for cell in (cell for row in grid for cell in row):
        is_blank = blank is not None and type(cell) is type(blank) and cell == blank
        if not (is_blank or (is_int(cell) and 1 <= cell <= n)):
            raise ValueError("a cell that is no digit" + (" or blank" if blank is not None else ""))
    return tuple(tuple(0 if cell == blank else cell for cell in row) for row in grid)


@cache
def units(n: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The cells (row, column) of every row, column and box."""
    box, span = isqrt(n), range(n)
    rows = [tuple((r, c) for c in span) for r in span]
    columns = [tuple((r, c) for r in span) for c in span]
    boxes = [tuple((r + i, c + j) for i in range(box) for j in range(box)) for r in span[::box] for c in span[::box]]
    return tuple(rows + columns + boxes)


def solutions(grid: Grid, limit: int, rng: Random | None = None) -> list[Grid] | None:
    """Up to `limit` solutions, or None when the search budget ends first.

    Exact backtracking over bit masks, most constrained cell first; `rng` tries digits in random order.
    """
    n, box = len(grid), isqrt(len(grid))
    rows, columns, boxes = [0] * n, [0] * n, [0] * n
    cells, empty, found, budget = [list(row) for row in grid], [], [], SEARCH_BUDGET
    for r, row in enumerate(grid):
        for c, digit in enumerate(row):
            if not digit:
                empty.append((r, c, r // box * box + c // box))
                continue
            bit, b = 1 << digit, r // box * box + c // box
            if (rows[r] | columns[c] | boxes[b]) & bit:
                return []
            rows[r], columns[c], boxes[b] = rows[r] | bit, columns[c] | bit, boxes[b] | bit

    def search() -> bool:  # True: stop
        nonlocal budget
        if not empty:
            found.append(_freeze(cells))
            return len(found) >= limit
        most = -1
        for i, (r, c, b) in enumerate(empty):
            taken = (rows[r] | columns[c] | boxes[b]).bit_count()
            if taken > most:
                k, most = i, taken
                if taken >= n - 1:  # one option or none: no cell can be more constrained
                    break
        empty[k], empty[-1] = empty[-1], empty[k]
        cell = r, c, b = empty.pop()
        taken = rows[r] | columns[c] | boxes[b]
        options = [d for d in range(1, n + 1) if not taken >> d & 1]
        if rng and len(options) > 1:
            rng.shuffle(options)
        for digit in options:
            budget -= 1
            if budget < 0:
                return True
            bit = 1 << digit
            rows[r], columns[c], boxes[b], cells[r][c] = rows[r] | bit, columns[c] | bit, boxes[b] | bit, digit
            if search():
                return True
            rows[r], columns[c], boxes[b] = rows[r] ^ bit, columns[c] ^ bit, boxes[b] ^ bit
        empty.append(cell)
        empty[k], empty[-1] = empty[-1], empty[k]
        return False

    search()
    return None if budget < 0 else found


@cache
def _all_solutions_4x4() -> list[Grid]:
    return solutions(((0,) * 4,) * 4, 288)


def _random_solution(n: int, rng: Random) -> Grid:
    """A full grid: exactly uniform over the 288 grids of size 4; for size 9 every grid can occur.

    The boxes on the diagonal do not constrain each other and are drawn first, the rest is a random search. It favours
    some of the 9×9 grids a little; no uniform sampler of them is known that is fast.
    """
    if n == 4:
        return rng.choice(_all_solutions_4x4())
    while True:
        cells, box = [[0] * n for _ in range(n)], isqrt(n)
        for first in range(0, n, box):
            digits = rng.sample(range(1, n + 1), n)
            for k in range(box):
                cells[first + k][first : first + box] = digits[k * box : (k + 1) * box]
        if grids := solutions(_freeze(cells), 1, rng):
            return grids[0]  # else an unlucky order ran out of budget


class _Trace:
    """Writes the chain of thought of one puzzle; the grid fills as it goes."""

    def __init__(self, problem: Grid, choices: Variation, verbosity: int):
        self.cells = [list(row) for row in problem]
        self.solution = solutions(problem, 1)[0]
        self.choices, self.verbosity, self.n = choices, verbosity, len(problem)

    def write(self) -> tuple[str, str]:
        lines = []
        while blanks := [(r, c) for r in range(self.n) for c in range(self.n) if not self.cells[r][c]]:
            ready = [cell for cell in blanks if len(self.options(cell)) == 1]
            waiting = [cell for cell in blanks if cell not in ready]
            if waiting and self.choices.happens("look", 0.2):
                lines.append(self.look(self.choices.pick(waiting)))
            lines.append(self.step(self.choices.pick(ready)) if ready else self.trial(self.choices.pick(blanks)))
        for count in range(self.verbosity, 0, -1):  # down to 1: which round is the last must show
            lines.extend([f"round {count}.", *self.verify()])
        return " ".join(lines), json.dumps(self.cells)

    def options(self, cell: tuple[int, int]) -> list[int]:
        used = {digit for kind in _UNITS for digit in self.held(cell, kind)}
        return [digit for digit in range(1, self.n + 1) if digit not in used]

    def held(self, cell: tuple[int, int], kind: str) -> list[int]:
        """Digits in the row, column or box of a cell, in reading order."""
        return [digit for digit in self.unit(cell, kind) if digit]

    def unit(self, cell: tuple[int, int], kind: str) -> list[int]:
        """The row, column or box of a cell in reading order, 0 for a blank."""
        (r, c), box = cell, isqrt(self.n)
        index = {"row": r, "column": self.n + c, "box": 2 * self.n + r // box * box + c // box}[kind]
        return [self.cells[i][j] for i, j in units(self.n)[index]]

    def evidence(self, cell: tuple[int, int]) -> str:
        seen = []
        for kind in self.choices.order(_UNITS):
            digits = (str(digit or "-") for digit in self.unit(cell, kind))
            seen.append(" ".join([self.choices.pick(_UNITS[kind]), *digits]))
        return f"{self.choices.pick(OPENERS)} {_cell(cell)}: {', '.join(seen)}"

    def look(self, cell: tuple[int, int]) -> str:
        return f"{self.evidence(cell)}, {self.choices.pick(('open', 'not yet', 'later'))}."

    def step(self, cell: tuple[int, int]) -> str:
        (r, c), (digit,) = cell, self.options(cell)
        line = self.evidence(cell)
        if self.choices.happens("slip", 0.06):  # a mistake, noticed and mended
            kind = self.choices.pick([kind for kind in _UNITS if self.held(cell, kind)])
            wrong = self.choices.pick(self.held(cell, kind))
            line += f", {self.choices.pick(SO)} {wrong}? no, {kind} has {wrong}"
        self.cells[r][c] = digit
        return f"{line}, {self.choices.pick(SO)} {_cell(cell)} {digit}."

    def trial(self, cell: tuple[int, int]) -> str:
        """No cell is settled by its own units: try the options, as one does on paper."""
        r, c = cell
        options = " ".join(map(str, self.options(cell)))
        line = f"{self.evidence(cell)}, open {options}, by trial {_cell(cell)} {self.solution[r][c]}."
        self.cells[r][c] = self.solution[r][c]
        return line

    def verify(self) -> Iterator[str]:
        """Every unit of the finished grid, in order: which comes next is plain, how it is said varies."""
        for (kind, k), unit in zip(product(_UNITS, range(self.n)), units(self.n), strict=True):
            name = f"{self.choices.pick(OPENERS)} {self.choices.pick(_UNITS[kind])} {k + 1}"
            digits = " ".join(str(self.cells[r][c]) for r, c in unit)
            yield f"{name}: {digits}, {self.choices.pick(FINE)}."


def _cell(cell: tuple[int, int]) -> str:
    return f"r{cell[0] + 1}c{cell[1] + 1}"
