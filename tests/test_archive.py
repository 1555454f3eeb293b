import shutil
import zipfile

import pandas as pd
import pytest

from asym import models, runs, sft
from asym.archive import pack, unpack
from asym.evaluate import measure
from asym.imbalance import measure_shares
from asym.params import ParamsError
from asym.runs import Run


@pytest.fixture
def finished(tmp_path):
    """A repository with a run of each kind, and one that is not finished."""
    for name in (
        "base",
        "base-language",
        "sft-sudoku-lambda_0.5",
        "data-sudoku-test",
        "rows-sudoku",
        "rl-sudoku-outcome",
    ):
        run = Run.open(tmp_path / "one", name, {"seed": 0})
        run.table(lambda name=name: pd.DataFrame({"name": [name]}))
        for file in ("checkpoint/model.safetensors", "trainer/checkpoint-1/optimizer.pt", "rollouts/00000-000.parquet"):
            runs.write_text(run.folder / file, name)
    Run.open(tmp_path / "one", "sft-sudoku-ngdiff", {"seed": 0})
    return tmp_path / "one"


def test_unpacked_runs_are_finished_and_have_no_weights_but_the_base(finished, tmp_path):
    file, there = tmp_path / "runs.zip", tmp_path / "two"
    assert pack(finished, file) == 4
    assert unpack(there, file) == 4
    names = {path.name.rpartition("-")[0] for path in (there / "runs").iterdir()}
    assert names == {"base", "sft-sudoku-lambda_0.5", "rows-sudoku", "rl-sudoku-outcome"}
    run = Run.open(there, "sft-sudoku-lambda_0.5", {"seed": 0})
    assert run.done
    assert run.table(lambda: pytest.fail("made again")).name.tolist() == ["sft-sudoku-lambda_0.5"]
    assert {path.name for path in run.folder.iterdir()} == {"DONE", "config.json", "manifest.json", "table.parquet"}
    assert (Run.open(there, "base", {"seed": 0}).checkpoint / "model.safetensors").read_text() == "base"
    with pytest.raises(ParamsError, match="no weights are here"):
        models.load(run.checkpoint)


def test_what_rl_started_from_keeps_its_weights(finished, tmp_path):
    start, _ = sorted((finished / "runs").glob("sft-*"))
    arm = Run.open(finished, "rl-sudoku-outcome", {"start": start.name})
    arm.table(lambda: pd.DataFrame({"name": ["arm"]}))
    pack(finished, tmp_path / "runs.zip")
    unpack(tmp_path / "two", tmp_path / "runs.zip")
    assert (tmp_path / "two" / "runs" / start.name / "checkpoint" / "model.safetensors").exists()


@pytest.mark.parametrize("name", [".", "no/such/folder/runs.zip"])
def test_a_file_that_cannot_be_written_is_told(finished, tmp_path, name):
    with pytest.raises(ParamsError, match="must be the name of a file in a folder that exists"):
        pack(finished, tmp_path / name)


def test_what_is_finished_here_stays_and_the_rest_is_completed(finished, tmp_path):
    file, there = tmp_path / "runs.zip", tmp_path / "two"
    pack(finished, file)
    own = Run.open(there, "rows-sudoku", {"seed": 0})
    own.table(lambda: pd.DataFrame({"name": ["own"]}))
    Run.open(there, "rl-sudoku-outcome", {"seed": 0})  # begun
    assert unpack(there, file) == 3
    assert own.table(lambda: pytest.fail("made again")).name.tolist() == ["own"]
    assert Run.open(there, "rl-sudoku-outcome", {"seed": 0}).done
    assert unpack(there, file) == 0


def test_the_same_runs_make_the_same_file(finished, tmp_path):
    pack(finished, tmp_path / "one.zip")
    pack(finished, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


@pytest.mark.parametrize(
    "name", ["../sft-sudoku-0a/DONE", "sft-sudoku-0a/../../DONE", "/etc/DONE", "DONE", "notes-x/y"]
)
def test_files_that_are_no_archive_of_runs_are_refused(tmp_path, name):
    file = tmp_path / "runs.zip"
    with pytest.raises(ParamsError, match="must be a file that `runs pack` wrote"):
        unpack(tmp_path, file)
    file.write_text("no archive")
    with pytest.raises(ParamsError, match="must be a file that `runs pack` wrote"):
        unpack(tmp_path, file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "")
    with pytest.raises(ParamsError, match="must be a file that `runs pack` wrote"):
        unpack(tmp_path, file)
    assert not (tmp_path / "runs").exists()


def test_an_unpacked_arm_has_all_that_the_notebooks_ask_of_it(tiny, base, root, tmp_path):
    def results():
        arm = sft.train_arm(p, base, "sudoku", "token_averaged", 0)
        shares = measure_shares(p, arm, "sudoku", "sft", "token_averaged", 0, p.sft_steps)
        return arm.metrics(), shares, measure(p, arm, "sudoku", "sft", "token_averaged", 0)

    p = tiny(curve_every=1)
    before = results()
    pack(root, tmp_path / "runs.zip")
    shutil.rmtree(root / "runs")
    unpack(root, tmp_path / "runs.zip")
    for one, same in zip(before, results(), strict=True):
        pd.testing.assert_frame_equal(one, same)
    assert not list((root / "runs").glob("sft-*/checkpoint"))
