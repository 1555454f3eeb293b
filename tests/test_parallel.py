import json
import os

import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from asym.data import load_split
from asym.evaluate import measure
from asym.parallel import side_by_side
from asym.sft import train_arm


@pytest.fixture(autouse=True)
def workers():
    """New ones for every test, for they know the environment of their start; none is left to write into later tests."""
    yield
    get_reusable_executor().shutdown(wait=True)


def where(index):
    if index < 0:
        raise ValueError(f"no {index}")
    return index, os.getpid()


def test_results_come_in_the_order_of_the_calls_from_other_processes():
    found = side_by_side(2, where, [(k,) for k in range(5)])
    assert [index for index, _ in found] == list(range(5))
    assert os.getpid() not in {process for _, process in found}
    assert side_by_side(1, where, [(3,)]) == [(3, os.getpid())]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_a_call_is_raised(workers):
    with pytest.raises(ValueError, match="no -1"):
        side_by_side(workers, where, [(0,), (-1,), (2,)])


def test_arms_are_the_same_in_workers_as_one_after_the_other(tiny, base, root, monkeypatch):
    """Weights and responses alike."""
    p, rows = tiny(), []
    for workers in (1, 2):
        monkeypatch.setenv("ASYM_RUNS", str(root / f"runs-{workers}"))
        calls = [(p, base, "sudoku", arm, 0) for arm in ("token_averaged", "ngdiff")]
        runs = side_by_side(workers, train_arm, calls)
        calls = [(p, run, "sudoku", "sft", run.config["arm"], 0) for run in runs]
        rows.append((pd.concat(side_by_side(workers, measure, calls)), runs))
    pd.testing.assert_frame_equal(rows[0][0], rows[1][0])
    for one, two in zip(rows[0][1], rows[1][1], strict=True):
        files = [run.checkpoint / "model.safetensors" for run in (one, two)]
        assert files[0] != files[1]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_workers_that_need_the_same_split_make_it_once(tiny, root, monkeypatch):
    monkeypatch.setenv("ASYM_RUNS", str(root / "runs"))
    p = tiny(n_train_sft=300)
    first, second = side_by_side(2, load_split, [(p, "sudoku", "train_sft", 0)] * 2)
    assert first["response"][:] == second["response"][:]
    (run,) = (root / "runs").glob("data-*/DONE")
    assert json.loads((run.parent / "manifest.json").read_text())["files"].keys() == {
        "config.json",
        "left_out.csv",
        "train_sft.parquet",
    }
