"""Run a study: its notebooks in order through papermill, each in its own process, into results/<study>/.

Everything is checked before anything is computed. A notebook reuses the arms that runs/ holds, so repeating an
interrupted study resumes it. Executed notebooks are published without what differs from machine to machine.
"""

import importlib.util
import json
import logging
import os
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from asym.params import Params, ParamsError
from asym.readme import write_readmes
from asym.runs import Run, devices, manifest, read_manifest, repo_root, results_dir, write_json, write_text

MACHINE = {"workers", "eval_batch"}  # how this machine works it out: what is finished is kept if they change
# What studies that are joined may differ in: which arms they have and what is drawn of them, not how an arm is made
FREE = MACHINE | {"study", "seeds", "tasks", "join", "lambdas", "balances", "curve_every", "long_steps"}
FREE |= {"dose_verbosity", "dose_variation", "dose_difficulty", "rl_curve_every", "alphas", "graded_alphas"}
FREE |= {"surrogates", "credits", "n_gradient", "bootstrap"}
RECENT = 64  # lines of progress that tell what is under way: every worker writes one a second


class NotebookError(RuntimeError):
    """A cell failed: which one, with what, and where to read on."""


def run_study(
    params_path: str | Path,
    only: list[str] | None = None,
    overrides: dict[str, str] | None = None,
    root: Path | None = None,
) -> None:
    """Execute the notebooks of the repository at `root`, or those whose names start with one of `only`.

    Writes results/<study>/notebooks/ and, after each notebook, manifest.json with the wall times in seconds spent on
    the study, resumptions included, and how many of the runs used were made on which of the "devices"; "complete" is
    true once every notebook ran with these parameters. A study that joins itself adds arms to what it has stored;
    "parts" tells of the runs before this one. What is no table of arms (notebook 1's, the long run, gradients) is this
    run's alone.
    Raises ParamsError before anything is computed, also where it would overwrite results of other parameters;
    NotebookError when a cell fails.
    """
    root = root or repo_root()
    params = Params.load(params_path, overrides)
    check(params)
    names = [path.stem for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    selected = _select(names, only)
    results = results_dir(params.study, root)
    before = read_manifest(results)
    # A parameter that is newer than those results was at its default when they were made
    made = Params().model_dump() | before.get("params", {})
    other = [key for key, value in params.model_dump().items() if made[key] != value and key not in MACHINE]
    if "params" in before and other and params.study not in params.join:
        raise ParamsError(
            f"{results}: study = {params.study!r}: holds results of other parameters ({', '.join(other)}): choose "
            f"another name, delete the folder, or set join = [{params.study}] to add arms to those it has"
        )

    run = Run.open(root, params.study, params.model_dump())
    clock_file, feed, opened = (run.folder / name for name in ("clock.json", "progress.jsonl", "opened.txt"))
    clock = {"expected": before.get("notebooks", {}), "spent": {}, "finished": []}
    if clock_file.exists():
        clock = json.loads(clock_file.read_text())
    with _Display(selected, clock, feed) as display:
        for name in selected:
            display.start(name)
            try:
                notebook = _execute(root, name, run.folder / f"{name}.ipynb", _changed(params), feed, opened)
            finally:
                clock["spent"][name] = round(clock["spent"].get(name, 0) + display.elapsed, 1)
                write_json(clock_file, clock)
            write_text(results / "notebooks" / f"{name}.ipynb", _portable(notebook, root))
            clock["finished"] = sorted({*clock["finished"], name})
            write_json(clock_file, clock)
            used = devices(root, opened.read_text(encoding="utf-8").split() if opened.exists() else ())
            _write_manifest(results, params, clock, names, root, _parts(before, params), used)
    write_readmes(root)


def check(p: Params) -> None:
    """Whether this machine has what a study asks for. Raises ParamsError before anything is computed."""
    from asym import data, models, published, start, training  # here, because they take seconds

    flash = p.attention == "flash_attention_2"
    needs = (
        (p.vllm, "vllm = True", "vllm", "set it to false, or install it where torch may be the one it asks for"),
        (flash, "attention = 'flash_attention_2'", "flash_attn", "set it to sdpa, or `pip install flash-attn`"),
    )
    for wanted, asked, package, instead in needs:
        if wanted and not importlib.util.find_spec(package):
            raise ParamsError(f"{asked}: needs the package {package}, which is not installed: {instead}")
    training.one_gpu()
    _joins(p)
    if p.start_model:
        start.own_start(p)
    if p.model:
        models.check(p.model, p.family)
    if p.data != "generated":
        published.fetch(p.data)
    elif "graph_coloring" in p.tasks:
        data.enough_graphs(p)


def _joins(p: Params) -> None:
    """Raises ParamsError if a study that is to join has no results here, or arms made in another way."""
    for name in p.join:
        made = read_manifest(repo_root() / "results" / name).get("params")
        if made is None:
            raise ParamsError(f"join: {name!r}: must be a study with its manifest.json in results/")
        made = Params().model_dump() | made
        other = [key for key, value in p.model_dump().items() if key not in FREE and made[key] != value]
        if other:
            told = ", ".join(f"{key} = {made[key]!r}, not {getattr(p, key)!r}" for key in other)
            raise ParamsError(f"join: {name!r}: must have this study's parameters but for its arms: it has {told}")


def room_for(name: str, message: str) -> str:
    """What to do about an error of this class name and message if it tells of too little memory, else ""."""
    # torch's on a CPU, the system's, CUDA's, vLLM's, and joblib's of a worker that was killed
    told = (
        "can't allocate memory",
        "cannot allocate memory",
        "out of memory",
        "no available memory",
        "excessive memory",
    )
    if name not in ("OutOfMemoryError", "MemoryError") and not any(words in message.lower() for words in told):
        return ""
    return (
        "too little memory: lower eval_batch or workers; or, as a study of another name, lower sft_batch (and raise "
        "sft_accumulation), raise rl_accumulation, or set activation_checkpointing or lora_rank; `python -m asym plan` "
        "says what takes how much"
    )


def _select(names: list[str], only: list[str] | None) -> list[str]:
    """The names that start with one of `only`, or all; ParamsError for one that fits none."""
    wrong = [start for start in only or [] if not any(name.startswith(start) for name in names)]
    if wrong or not names:
        raise ParamsError(f"--only {' '.join(wrong)}: allowed are the notebooks {', '.join(names) or '(none found)'}")
    return [name for name in names if not only or name.startswith(tuple(only))]


def _changed(params: Params) -> dict:
    """What the notebooks' parameter cells, which hold the defaults, must be told."""
    defaults = Params().model_dump()
    return {key: value for key, value in params.model_dump().items() if value != defaults[key]}


def _execute(root: Path, name: str, copy: Path, parameters: dict, feed: Path, opened: Path) -> nbformat.NotebookNode:
    """Run one notebook from the repository root; `copy` holds it as far as it came, `opened` names the runs it used."""
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that a notebook does not show
    before = {key: os.environ.get(key) for key in ("ASYM_PROGRESS", "ASYM_OPENED")}
    os.environ |= {"ASYM_PROGRESS": str(feed), "ASYM_OPENED": str(opened)}
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else every kernel start prints a debugger's warning
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # else tqdm asks for widgets no one needs
    try:
        source = root / "notebooks" / f"{name}.ipynb"
        return papermill.execute_notebook(
            source,
            copy,
            parameters,
            kernel_name="python3",
            language="python",
            cwd=root,
            progress_bar=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else every start warns of its local connection
            shutdown_kernel="immediate",  # a kernel asked politely prints a traceback when interrupted
        )
    except PapermillExecutionError as error:
        where, what = f"In [{error.exec_count}]", f"{error.ename}: {error.evalue}"
        if hint := room_for(error.ename, error.evalue):
            what += f"\n{hint}"
        raise NotebookError(f"{name}, {where}: {what}\nthe cell and the full traceback are in {copy}") from None
    except DeadKernelError:
        raise NotebookError(f"{name}: its process died, perhaps for want of memory; how far it came: {copy}") from None
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _portable(notebook: nbformat.NotebookNode, root: Path) -> str:
    """The executed notebook as text, without times and without the paths of this machine."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.id = "injected-parameters"  # papermill's is random
    # Anchored at the start of a word: else every character of a picture's base64 would be tried as one
    text = re.sub(r'(?<![^\s"])[^\s"]*/ipykernel_\d+/\d+\.py', "<cell>", nbformat.writes(notebook))
    paths = {str(root.resolve()): ".", str(root): ".", sys.prefix: ".venv", str(Path.home()): "~"}
    for path in sorted(paths.keys() - {"/"}, key=len, reverse=True):
        text = re.sub(rf"{re.escape(path)}(?![\w-])", paths[path], text)
    return text + "\n"


def _parts(before: dict, params: Params) -> list[dict]:
    """What made the stored arms of a study that joins itself: of every earlier run, the parameters that are free."""
    if not before or params.study not in params.join:
        return []
    made = Params().model_dump() | before["params"]
    if made == params.model_dump():  # resumed
        return before.get("parts", [])
    free = {key: made[key] for key in made if key in FREE}
    kept = ("notebooks", "revision", "packages", "platform", "devices", "seconds", "utc")
    return [*before.get("parts", []), {"params": free} | {key: before[key] for key in kept if key in before}]


def _write_manifest(
    results: Path, params: Params, clock: dict, names: list[str], root: Path, parts: list[dict], used: dict[str, int]
) -> None:
    files = _files(results)
    about = manifest(params.model_dump(), sum(clock["spent"].values()), files, root)
    about["torch_threads"] = params.threads  # of the notebooks, not of this process
    about["devices"] = used
    published = {path.stem for path in files if path.parent.name == "notebooks"}
    complete = set(names) <= published & set(clock["finished"])
    head = {"study": params.study, "complete": complete, "notebooks": dict(sorted(clock["spent"].items()))}
    write_json(results / "manifest.json", head | about | ({"parts": parts} if parts else {}))


def renew_manifest(results: Path) -> None:
    """Hash the files of a results folder anew, some of which were recomputed from its rows by this revision."""
    kept = read_manifest(results)
    again = manifest(kept["params"], 0, _files(results), results.parents[1])
    write_json(results / "manifest.json", kept | {"files": again["files"], "recomputed": again["revision"]})


def _files(results: Path) -> list[Path]:
    return [path for path in sorted(results.rglob("*")) if path.is_file() and path != results / "manifest.json"]


class _Display:
    """Two bars with the time left, of the notebooks and of what the current one does; without a terminal, plain lines.

    `clock` holds the expected and the spent seconds of each notebook, `feed` the lines of `asym.runs.progress`.
    """

    def __init__(self, names: list[str], clock: dict, feed: Path):
        self.names, self.clock, self.feed = names, clock, feed
        self.current, self.started = names[0], time.monotonic()
        self.console = Console(stderr=True)
        columns = ("{task.description}", BarColumn(), "{task.completed:g}/{task.total:g}", "{task.fields[left]}")
        self.bars = Progress(*[TextColumn(c) if isinstance(c, str) else c for c in columns], console=self.console)
        self.outer = self.bars.add_task("", total=len(names), left="")
        self.inner = self.bars.add_task("", total=1, left="", visible=False)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Display":
        if self.console.is_terminal:
            self.bars.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        if kind is None:
            self.bars.update(self.outer, completed=len(self.names), left="")
        self.bars.update(self.inner, visible=False)
        self.bars.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the current notebook started."""
        return time.monotonic() - self.started

    def start(self, name: str) -> None:
        self.feed.write_text("")
        self.current, self.started = name, time.monotonic()
        self._show(heading=True)

    def _watch(self) -> None:
        while not self.stop.wait(1 if self.console.is_terminal else 30):
            self._show()

    def _show(self, heading: bool = False) -> None:
        done, tasks = self.names.index(self.current), self._tasks()
        if self.console.is_terminal:
            self.bars.update(self.outer, description=self.current, completed=done, left=_words(self._left()))
            self.bars.update(self.inner, visible=bool(tasks))
            if tasks:
                label = "  " + ", ".join(task["label"] for task in tasks)
                done, total = (sum(task[key] for task in tasks) for key in ("done", "total"))
                left = _words(max((task["eta"] for task in tasks if task["eta"]), default=None))
                self.bars.update(self.inner, description=label, completed=done, total=total, left=left)
        elif heading:
            print(f"{self.current} ({done + 1} of {len(self.names)})  {_words(self._left())}", flush=True)
        else:
            for task in tasks:
                print(f"  {task['label']}: {task['done']}/{task['total']}  {_words(task['eta'])}", flush=True)

    def _left(self) -> float | None:
        """Seconds left in all, from the wall times of an earlier complete study; None if there was none."""
        coming = self.names[self.names.index(self.current) :]
        if not all(name in self.clock["expected"] for name in coming):
            return None
        spent = self.clock["spent"] | {self.current: self.clock["spent"].get(self.current, 0) + self.elapsed}
        return sum(max(0, self.clock["expected"][name] - spent.get(name, 0)) for name in coming)

    def _tasks(self) -> list[dict]:
        """What is under way, by the last lines of the feed: the task of each process; none between tasks."""
        with suppress(OSError, ValueError, IndexError):
            lines = self.feed.read_text(encoding="utf-8").splitlines()[-RECENT:]
            latest = {task["process"]: task for task in map(json.loads, lines)}
            return [task for task in latest.values() if task["done"] < task["total"]]
        return []


def _words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
