"""The tasks: everything the study knows about a puzzle lives in its task, everything else is the same for all."""

from asym.tasks.graph_coloring import GraphColoring
from asym.tasks.sudoku import Sudoku
from asym.tasks.task import Drawing, Task, Variation

TASKS: dict[str, type[Task]] = {task.name: task for task in (Sudoku, GraphColoring)}

__all__ = ["TASKS", "Drawing", "GraphColoring", "Sudoku", "Task", "Variation", "get_task"]


def get_task(name: str, **sizes) -> Task:
    """The task called `name`; `sizes` are its own fields. Raises ValueError on an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: allowed are {', '.join(TASKS)}")
    return TASKS[name](**sizes)
