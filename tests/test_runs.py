import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from filelock import Timeout

from asym import runs
from asym.params import ParamsError
from asym.runs import (
    Run,
    joined,
    progress,
    read_manifest,
    results_dir,
    unstored,
    write_csv,
    write_parquet,
    write_text,
)


def test_importing_runs_does_not_import_torch():
    code = "import sys, asym.runs; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_run_folder_is_named_by_its_config(tmp_path):
    run = Run.open(tmp_path, "sft", {"lr": 0.1, "seed": 0})
    assert run.folder.parent == tmp_path / "runs"
    assert run.folder == Run.open(tmp_path, "sft", {"seed": 0, "lr": 0.1}).folder
    assert run.folder != Run.open(tmp_path, "sft", {"seed": 1, "lr": 0.1}).folder
    assert json.loads((run.folder / "config.json").read_text()) == run.config


def test_runs_can_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ASYM_RUNS", str(tmp_path / "scratch"))
    assert Run.open(tmp_path, "sft", {}).folder.parent == tmp_path / "scratch"


def test_reusing_what_other_code_made_warns(tmp_path, monkeypatch):
    run = Run.open(tmp_path, "sft", {"seed": 0})
    run.finish()
    Run.open(tmp_path, "sft", {"seed": 0})  # warnings are errors
    monkeypatch.setattr(runs, "_code", lambda kind: "other")
    with pytest.warns(UserWarning, match=rf"{run.folder} was made by other code"):
        Run.open(tmp_path, "sft", {"seed": 0})


def test_finish_writes_manifest_then_done(tmp_path, monkeypatch):
    run = Run.open(tmp_path, "sft", {"seed": 0})
    for name in ("metrics.csv", "checkpoint/model.safetensors", "trainer/checkpoint-1/optimizer.pt"):
        runs.write_text(run.folder / name, "abc")
    written = []
    write_text = runs.write_text
    monkeypatch.setattr(runs, "write_text", lambda path, text: (written.append(path.name), write_text(path, text)))
    assert not run.done
    run.finish(arm="ngdiff")
    assert run.done
    assert written == ["manifest.json", "DONE"]
    about = read_manifest(run.folder)
    assert about["params"] == {"seed": 0}
    assert about["arm"] == "ngdiff"
    assert set(about["files"]) == {"config.json", "metrics.csv", "checkpoint/model.safetensors"}
    assert about["files"]["metrics.csv"].startswith("ba7816bf")  # SHA-256 of "abc"


def test_last_trainer_checkpoint_is_the_newest_complete_one(tmp_path):
    run = Run.open(tmp_path, "sft", {})
    assert run.last_trainer_checkpoint() is None
    for step in (9, 10, 100):
        (run.folder / f"trainer/checkpoint-{step}").mkdir(parents=True)
    for step in ("9", "10", "best"):
        runs.write_text(run.folder / f"trainer/checkpoint-{step}/trainer_state.json", "{}")
    assert run.last_trainer_checkpoint() == run.folder / "trainer/checkpoint-10"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep" / "table.csv"
    runs.write_csv(path, pd.DataFrame({"a": [1], "b": ["é"]}))
    assert path.read_bytes() == "a,b\n1,é\n".encode()

    class Broken:
        def to_csv(self, file, **_):
            file.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runs.write_csv(path, Broken())
    assert path.read_bytes() == "a,b\n1,é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_parquet_round_trip(tmp_path):
    frame = pd.DataFrame({"a": [0.5], "text": ["x"]})
    runs.write_parquet(tmp_path / "x.parquet", frame)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "x.parquet"), frame)


def test_results_folder_is_claimed_and_kept(tmp_path):
    folder = results_dir("mine", tmp_path)
    runs.write_text(folder / "tables" / "sft.csv", "")
    assert results_dir("mine", tmp_path) == folder
    assert read_manifest(folder) == {"study": "mine", "complete": False}
    folder.rename(folder.with_name("yours"))
    with pytest.raises(ParamsError, match="study = 'mine': must be 'yours'"):
        results_dir("yours", tmp_path)
    (tmp_path / "results/yours/manifest.json").write_text("not ours")
    with pytest.raises(ParamsError, match="study = 'yours': must be a new or empty folder"):
        results_dir("yours", tmp_path)


def test_revision_is_dirty_for_code_but_not_for_results(tmp_path, monkeypatch):
    def git(*args):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    monkeypatch.setattr(runs, "repo_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs._revision() == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    runs.write_text(tmp_path / "results/x/table.csv", "1")
    assert len(runs._revision()) == 40
    (tmp_path / "code.py").write_text("2")
    assert runs._revision().endswith("-dirty")


def test_progress_reports_to_a_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ASYM_PROGRESS", str(tmp_path / "feed.jsonl"))
    with progress("train", 1000) as bar:
        for _ in range(1000):
            bar.update()
    lines = [json.loads(line) for line in (tmp_path / "feed.jsonl").read_text().splitlines()]
    about = {"label": "train", "process": os.getpid(), "total": 1000}
    assert lines[0] == about | {"done": 0, "eta": None}
    assert lines[-1] == about | {"done": 1000, "eta": 0}
    assert len(lines) < 10
    assert capfd.readouterr() == ("", "")


def test_progress_off_is_silent(monkeypatch, capfd):
    monkeypatch.setenv("ASYM_PROGRESS", "off")
    with progress("train", 2) as bar:
        bar.update(2)
    assert capfd.readouterr() == ("", "")


def test_two_processes_take_turns_on_a_run(tmp_path):
    run, same = (Run.open(tmp_path, "work", {"a": 1}) for _ in range(2))
    with run.locked(), pytest.raises(Timeout), same.lock.acquire(timeout=0.05):
        pass
    with same.locked():
        assert not same.done
    assert [path.name for path in (tmp_path / "runs").glob("[!.]*")] == [run.folder.name]


def test_a_download_is_known_on_every_machine_and_a_folder_by_its_place(tmp_path):
    named = []
    for machine in ("one", "two"):
        blob = tmp_path / machine / "blobs" / "5f3a"
        write_text(blob, "weights")
        snapshot = tmp_path / machine / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)
        named.append(Run.linked(tmp_path / machine, snapshot).folder.name)
    assert named[0] == named[1]
    other = tmp_path / "one" / "snapshots" / "other"
    other.mkdir()
    write_text(tmp_path / "one" / "blobs" / "77aa", "other weights")
    (other / "model.safetensors").symlink_to(tmp_path / "one" / "blobs" / "77aa")
    assert Run.linked(tmp_path / "one", other).folder.name != named[0]

    moved = tmp_path / "moved" / "snapshots"
    (tmp_path / "one" / "snapshots" / "main").rename(moved.parent.parent / "main")
    moved.mkdir(parents=True)
    (moved.parent.parent / "main").rename(moved / "main")
    run = Run.linked(tmp_path / "one", moved / "main")
    assert run.folder.name == named[0]
    assert (run.checkpoint / "model.safetensors").read_text() == "weights"
    folders = [tmp_path / name / "blobs" for name in ("a", "b")]
    for folder in folders:
        write_text(folder / "model.safetensors", "weights")
    one, other = (Run.linked(tmp_path, folder) for folder in folders)
    assert one.folder != other.folder
    assert (one.checkpoint / "model.safetensors").read_text() == "weights"


def test_arms_that_other_studies_have_stored_join_and_of_one_arm_the_first_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("asym.runs.repo_root", lambda: tmp_path)
    arm = {"task": "sudoku", "family": "x", "arm": "ngdiff"}
    own = pd.DataFrame([arm | {"seed": 0, "a": a} for a in (0.0, 1.0)])
    for study, seeds in (("second", (0, 1)), ("third", (1, 2))):
        rows = pd.DataFrame([arm | {"seed": seed, "a": seed + 5.0} for seed in seeds for _ in range(2)])
        write_parquet(tmp_path / "results" / study / "rows" / "sft.parquet", rows)
    found = joined([own], ["second", "third"], "rows/sft.parquet")
    assert found.groupby("seed").a.apply(list).to_dict() == {0: [0.0, 1.0], 1: [6.0, 6.0], 2: [7.0, 7.0]}
    assert list(joined([own], [], "rows/sft.parquet").a) == [0.0, 1.0]
    assert list(joined([], ["third"], "rows/sft.parquet").a) == [6.0, 6.0, 7.0, 7.0]
    dosed = own.assign(axis="length", level=[0.0, 1.0])
    write_csv(tmp_path / "results" / "second" / "tables" / "dose.csv", dosed.assign(level=[1.0, 3.0], a=[8.0, 9.0]))
    assert list(joined([dosed], ["second"], "tables/dose.csv").a) == [0.0, 1.0, 9.0]
    arms = [("sudoku", "ngdiff", seed) for seed in range(4)]
    assert unstored(arms, [], "rows/sft.parquet") == arms
    assert unstored(arms, ["second"], "rows/sft.parquet") == arms[2:]
    assert unstored(arms, ["second", "third"], "rows/sft.parquet") == arms[3:]
    with pytest.raises(ParamsError, match=r"join: 'nowhere': has no rows/sft.parquet to join"):
        joined([own], ["nowhere"], "rows/sft.parquet")
