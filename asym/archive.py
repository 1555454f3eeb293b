"""Finished runs in one file, without weights: enough to open a study's notebooks with their results, or to add to it.

Left out are the data splits, which are made in seconds, the trainers' own checkpoints, and every model but those from
which further arms start (the base, and what the RL arms of the archive started from: trained anew on another machine it
would be a little different, and arms of one seed no longer comparable). What was logged, written and scored is there.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from asym.params import ParamsError
from asym.runs import replacing, runs_dir

RUN = re.compile(r"[a-z]+(-[\w.]+)*-[0-9a-f]+")  # of a folder in runs/
WEIGHTS = ("checkpoint", "trainer", "rollouts")  # folders; the rollouts of a training are in one file when it is done
BASE = re.compile(r"base-[0-9a-f]+")


def pack(root: Path, path: Path) -> int:
    """Write all finished runs of the repository at `root` to the zip file `path`; returns how many.

    Raises ParamsError if no such file can be written.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ParamsError(f"{path}: must be the name of a file in a folder that exists")
    runs = [folder for folder in sorted(runs_dir(root).glob("*-*")) if (folder / "DONE").exists()]
    runs = [folder for folder in runs if not folder.name.startswith(("data-", "model-", "base-language-"))]
    starts = {json.loads((folder / "config.json").read_text(encoding="utf-8")).get("start") for folder in runs}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in runs:
            for file in sorted(_kept(folder, bool(BASE.fullmatch(folder.name)) or folder.name in starts)):
                # Without times of files: the same runs make the same archive
                archive.writestr(zipfile.ZipInfo(f"{folder.name}/{file.as_posix()}"), (folder / file).read_bytes())
    return len(runs)


def _kept(folder: Path, weights: bool) -> Iterator[Path]:
    left_out = set(WEIGHTS) - ({"checkpoint"} if weights else set())
    for file in folder.rglob("*"):
        inside = file.relative_to(folder)
        if file.is_file() and not file.name.startswith(".") and inside.parts[0] not in left_out:
            yield inside


def unpack(root: Path, path: Path) -> int:
    """Put the runs of the zip file `path` beside those of the repository at `root`; returns how many are new.

    Runs that are finished here stay as they are. Raises ParamsError if the file is no archive of runs.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ParamsError(f"{path}: must be a file that `runs pack` wrote: {error}") from None
    with archive:
        files = {}
        for name in archive.namelist():
            folder, *inside = PurePosixPath(name).parts
            if not RUN.fullmatch(folder) or not inside or ".." in inside:
                raise ParamsError(f"{path}: {name!r}: must be a file that `runs pack` wrote")
            files.setdefault(folder, []).append(name)
        new = [folder for folder in files if not (runs_dir(root) / folder / "DONE").exists()]
        for folder in new:
            for name in sorted(files[folder], key=lambda name: name.endswith("/DONE")):  # last what makes it finished
                with replacing(runs_dir(root) / name) as temporary:
                    temporary.write_bytes(archive.read(name))
    return len(new)
