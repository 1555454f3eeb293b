"""Run folders, results folders, manifests, atomic writes and progress: all that touches the disk, whatever is run.

    run = Run.open(repo_root(), "sft-sudoku", config)      # runs/sft-sudoku-<hash of config>/
    with run.locked():
        if not run.done:
            train(resume_from=run.last_trainer_checkpoint(), save_to=run.checkpoint)
            run.finish()

A file is either there completely or not at all, and DONE is the last one written: a finished run is reused, a
half-finished one resumes. Two processes that come for the same run take turns (`locked`). The environment variable
ASYM_RUNS names another folder for runs than <root>/runs; ASYM_OPENED a file that the name of every opened run is added
to.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from tqdm import tqdm

from asym.params import ParamsError, digest

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "pytorch-optimizer", "torchjd")
PACKAGES += ("datasets", "tokenizers", "numpy", "scipy", "pandas")


def first() -> bool:
    """Whether this process is the only one or the first of those that a launcher (torchrun, accelerate) started."""
    return os.environ.get("RANK", "0") == "0"


def repo_root() -> Path:
    """The repository's folder, whatever the current one: papermill runs in the caller's, nbval in the notebook's."""
    return Path(__file__).resolve().parents[1]


def results_dir(study: str, root: Path | None = None) -> Path:
    """The folder results/<study>, made if new, under the repository root.

    Raises ParamsError if it holds another study, or files that no manifest accounts for.
    """
    folder = (root or repo_root()) / "results" / study
    path = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise ParamsError(f"{folder}: study = {study!r}: must be the name of a folder")
    owner = read_manifest(folder).get("study")
    if owner is None and folder.exists() and any(folder.iterdir()):
        raise ParamsError(f"{folder}: study = {study!r}: must be a new or empty folder, or one with its manifest.json")
    if owner is None:
        write_json(path, {"study": study, "complete": False})
    elif owner != study:
        raise ParamsError(f"{path}: study = {owner!r}: must be {study!r}; move the folder or rename the study")
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, {} if there is none (or none that can be read)."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stamp(file: Path) -> tuple[int, int]:
    """What tells a file from another that had or will have its name, without reading it: size and time (ns)."""
    return file.stat().st_size, file.stat().st_mtime_ns


def runs_dir(root: Path) -> Path:
    """Where runs are: <root>/runs, or what ASYM_RUNS names."""
    return Path(os.environ.get("ASYM_RUNS", root / "runs"))


def joined(own: Sequence["pd.DataFrame"], studies: Iterable[str], name: str) -> "pd.DataFrame":
    """Tables of this study in one, followed by what others have stored as results/<study>/<name> of further arms.

    An arm is known by its task, family, name and seed and, where there are doses, by axis and level, as far as the
    table has these columns. Of an arm that several studies have, only the first's lines are kept. There must be an own
    table or a study.
    """
    import pandas as pd

    tables = list(own)
    for study in studies:
        path = repo_root() / "results" / study / name
        if not path.exists():
            raise ParamsError(f"join: {study!r}: has no {name} to join; run it again with this version")
        stored = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        keys = [key for key in ("task", "family", "arm", "seed", "axis", "level") if key in stored]
        for table in tables:
            known = pd.MultiIndex.from_frame(table[keys].drop_duplicates())
            stored = stored[~pd.MultiIndex.from_frame(stored[keys]).isin(known)]
        tables.append(stored)
    return pd.concat(tables, ignore_index=True)


def unstored(arms: Iterable[tuple[str, str, int]], studies: Sequence[str], name: str) -> list[tuple[str, str, int]]:
    """Those of some arms (task, arm, seed) of which no study has lines stored as results/<study>/<name>."""
    stored = joined([], studies, name)[["task", "arm", "seed"]] if studies else None
    known = set() if stored is None else set(stored.itertuples(index=False, name=None))
    return [arm for arm in arms if arm not in known]


@dataclass(frozen=True)
class Run:
    """One piece of work with its folder, named by the hash of everything that determines its outcome."""

    folder: Path
    config: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, root: Path, name: str, config: dict[str, Any]) -> "Run":
        """The run <root>/runs/<name>-<digest of config>, made if new. `config` must be plain JSON values."""
        run = cls(runs_dir(root) / f"{name}-{digest(config)}", config)
        if run.done and read_manifest(run.folder).get("code") != _code(name.partition("-")[0]):
            warnings.warn(f"{run.folder} was made by other code; delete it to make it anew", stacklevel=2)
        write_json(run.folder / "config.json", config)
        if opened := os.environ.get("ASYM_OPENED"):
            with open(opened, "a", encoding="utf-8") as file:
                file.write(run.folder.name + "\n")
        return run

    @classmethod
    def along(cls, root: Path, name: str, config: dict[str, Any], steps: int, every: int) -> dict[int, "Run"]:
        """The runs of one training by step: its model every so many steps (0: none), and last the training itself."""
        between = range(every, steps, every) if every else ()
        configs = {step: config | {"at": step} for step in between} | {steps: config}
        return {step: cls.open(root, name, config) for step, config in configs.items()}

    @classmethod
    def linked(cls, root: Path, folder: Path) -> "Run":
        """A finished run whose checkpoint is a folder from elsewhere; its hash names it in what is made from it.

        A download of the hub's is known by the hashes in its cache, on every machine alike; any other folder by its
        place and its files' sizes and times.
        """
        files = [[path.name, path.resolve()] for path in sorted(folder.iterdir())]
        if folder.parent.name == "snapshots" and all(file.parent.name == "blobs" for _, file in files):
            config = {"files": [[name, file.name] for name, file in files]}
        else:
            stats = [[name, *stamp(file)] for name, file in files]
            config = {"folder": str(folder), "files": stats}
        run = cls.open(root, "model", config)
        with run.locked():
            if not (run.done and run.checkpoint.exists()):
                run.checkpoint.unlink(missing_ok=True)  # of a call that was interrupted, or of a cache that has moved
                run.checkpoint.symlink_to(folder)
                run.finish()
        return run

    @contextmanager
    def locked(self, together: bool = False) -> Iterator[None]:
        """A context in which no other process works on this run, also none that an earlier study left behind.

        `together`: all processes of a launch do this work at once; the first holds the lock for them.
        """
        together = together and "RANK" in os.environ
        with nullcontext() if together and not first() else self.lock:
            if together:
                from accelerate import PartialState

                PartialState().wait_for_everyone()
            yield

    @property
    def lock(self) -> FileLock:
        return FileLock(self.folder.with_name(f".{self.folder.name}.lock"))

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    @property
    def checkpoint(self) -> Path:
        """Where the trained model is saved."""
        return self.folder / "checkpoint"

    def last_trainer_checkpoint(self) -> Path | None:
        """The newest trainer/checkpoint-<step> that is complete: the trainer writes trainer_state.json last."""
        complete = [path.parent for path in self.folder.glob("trainer/checkpoint-*/trainer_state.json")]
        complete = [folder for folder in complete if folder.name.removeprefix("checkpoint-").isdigit()]
        return max(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)

    def metrics(self, **about: Any) -> "pd.DataFrame":
        """What training logged, one row per logged step, with the columns of `about` in front."""
        import pandas as pd

        table = pd.read_csv(self.folder / "metrics.csv").assign(**about)
        return table[[*about, *table.columns.difference(about, sort=False)]]

    def table(self, make: Callable[[], "pd.DataFrame"]) -> "pd.DataFrame":
        """The table that this run consists of, made now if it has not been."""
        import pandas as pd

        path = self.folder / "table.parquet"
        with self.locked():
            if not self.done:
                write_parquet(path, make())
                self.finish()
        return pd.read_parquet(path)

    def finish(self, **manifest_extra: Any) -> None:
        """Write the manifest, with the wall time since `open` and the hash of every file kept, then DONE."""
        kept = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        kept = [path for path in kept if path.relative_to(self.folder).parts[0] not in ("trainer", "manifest.json")]
        about = manifest(self.config, time.monotonic() - self.started, kept, self.folder)
        about["code"] = _code(self.folder.name.partition("-")[0])
        write_json(self.folder / "manifest.json", about | manifest_extra)
        write_text(self.folder / "DONE", "")


def devices(root: Path, names: Iterable[str]) -> dict[str, int]:
    """How many of the finished runs of these names each device made: `archive` brings some from other machines."""
    manifests = [read_manifest(runs_dir(root) / name) for name in set(names)]
    return dict(sorted(Counter(made["device"] for made in manifests if "device" in made).items()))


def manifest(params: dict[str, Any], seconds: float, files: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """What is needed to repeat a result and to know it again: parameters, code, versions, machine, file hashes, time.

    File names are relative to `root` (default: the repository). The revision ends in -dirty if anything but results/
    differs from it.
    """
    import torch  # here, because it takes seconds

    root = root or repo_root()
    return {
        "params": params,
        "digest": digest(params),
        "revision": _revision(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "files": {path.relative_to(root).as_posix(): _sha256(path) for path in files},
        "seconds": round(seconds, 1),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _code(kind: str) -> str:
    """The hash of the sources of `asym` that runs of a kind depend on: data, base, sft, shares, rl; others as rows."""
    # These draw, judge, drive and keep; what a run is told by params.py is in its config
    others = {"__main__", "archive", "bench", "claims", "coupling", "figures", "forest", "growth", "imbalance"}
    others |= {"parallel", "params", "plan", "readme", "runs", "start", "stats", "study", "trends", "trial"}
    if kind == "shares":
        others.remove("imbalance")
    if kind != "rl":
        others |= {"rewards", "self_rewards", "credit", "screen", "rl"}
    if kind in ("data", "base", "sft"):
        others |= {"decode", "evaluate", "scoring"}
    folder = Path(__file__).parent
    sources = sorted(path for path in folder.rglob("*.py") if path.stem not in others)
    return digest([[path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")] for path in sources])


def _revision() -> str:
    """The commit checked out here, with -dirty if code differs; "unknown" outside git."""
    git = ["git", "-C", str(repo_root())]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", ".", ":(exclude)results"]
        dirty = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "-dirty" * bool(dirty)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context with a temporary file that becomes `path` in one step once it is completely on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def write_parquet(path: Path, table: "pd.DataFrame") -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd", compression_level=9)  # texts: a third of the size


class _FileBar(tqdm):
    """A bar that appends its state to the file ASYM_PROGRESS as a JSON line where others draw themselves."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        rate = self.format_dict["rate"] or self.n / max(self.format_dict["elapsed"], 1e-9)
        eta = round((self.total - self.n) / rate, 1) if rate else None
        state = {"label": self.desc, "process": os.getpid(), "done": self.n, "total": self.total, "eta": eta}
        with suppress(OSError), open(os.environ["ASYM_PROGRESS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(state) + "\n")


def progress(label: str, total: int) -> tqdm:
    """A context manager with `.update(n=1)`: a bar with the time left, drawn at most once a second.

    The environment variable ASYM_PROGRESS redirects it: "off" shows nothing; a file name appends JSON lines
    {"label", "process", "done", "total", "eta" in seconds} to that file, for a driver to show.
    """
    where = os.environ.get("ASYM_PROGRESS", "")
    bar, file = (tqdm, sys.stderr) if where in ("", "off") else (_FileBar, io.StringIO())
    return bar(total=total, desc=label, mininterval=1, miniters=1, leave=False, file=file, disable=where == "off")
