import pandas as pd
import pytest

from asym import rl, screen
from asym.params import ParamsError
from asym.runs import Run
from asym.screen import GRADIENTS, NAMES, reward_gradients, scored_rollouts


@pytest.fixture
def start(base, root, monkeypatch):
    monkeypatch.setattr("asym.screen.repo_root", lambda: root)
    return Run(base.folder, base.config)


def test_every_rollout_has_every_surrogate_once(tiny, start, monkeypatch):
    p = tiny(coupling_rollouts=2)
    rows = scored_rollouts(p, start, "sudoku", 0)
    assert rows.groupby("mode").size().to_dict() == {"counterfactual": 4, "end_to_end": 4}
    own = rows["mode"] == "end_to_end"
    assert rows[own][NAMES].notna().all(axis=None)
    assert rows[~own][NAMES].isna().all(axis=None)
    monkeypatch.setattr(screen, "with_surrogates", None)
    pd.testing.assert_frame_equal(scored_rollouts(p, start, "sudoku", 0), rows)


def test_gradients_are_those_of_the_first_problems(tiny, start, monkeypatch):
    p = tiny(coupling_rollouts=2, n_gradient=1)
    gradients = reward_gradients(p, start, "sudoku", 0)
    assert list(gradients.reward) == GRADIENTS
    assert gradients.problem_id.nunique() == 1
    monkeypatch.setattr(screen, "policy_gradients", None)
    again = reward_gradients(p, start, "sudoku", 0)
    assert list(again.whole[0]) == list(gradients.whole[0])


def test_the_table_ranks_every_surrogate(tiny, start):
    table = screen.screen(tiny(coupling_rollouts=2, bootstrap=10), start, "sudoku")
    assert set(table.surrogate) == set(NAMES)


def test_rl_can_start_from_a_checkpoint_of_ones_own(tiny, base, root):
    run = rl.train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert run.checkpoint.resolve() == base.checkpoint.resolve()
    again = rl.train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert again.folder == run.folder


def test_a_folder_without_a_checkpoint_is_refused(tiny, root):
    with pytest.raises(ParamsError, match=r"start_model = .*must be the folder of a checkpoint"):
        rl.train_start(tiny(start_model=str(root)), None, "sudoku", 0)
