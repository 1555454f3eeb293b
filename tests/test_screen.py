import pandas as pd
import pytest

from asym import screen
from asym.runs import Run
from asym.screen import GRADIENTS, NAMES, reward_gradients, scored_rollouts


@pytest.fixture
def start(base, root):
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


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_are_those_of_the_first_problems(tiny, start, monkeypatch, rank):
    p = tiny(coupling_rollouts=2, n_gradient=1, lora_rank=rank)
    gradients = reward_gradients(p, start, "sudoku", 0)
    assert gradients.problem_id.nunique() == 1
    assert gradients["rollout"].tolist() == [0, 1]
    assert gradients[GRADIENTS].notna().all(axis=None)
    monkeypatch.setattr(screen, "policy_gradients", None)
    again = reward_gradients(p, start, "sudoku", 0)
    assert list(again.whole[0]) == list(gradients.whole[0])


@pytest.mark.parametrize("change", [{"difficulty_sudoku": 0.1}, {"blanks_max": 6}, {"n_coupling": 1}], ids=str)
def test_other_problems_or_drawings_are_screened_anew(tiny, start, monkeypatch, change):
    p = tiny(coupling_rollouts=2)
    scored_rollouts(p, start, "sudoku", 0)
    monkeypatch.setattr(screen, "with_surrogates", None)
    with pytest.raises(TypeError):  # would score
        scored_rollouts(p.model_copy(update=change), start, "sudoku", 0)


def test_the_table_ranks_every_surrogate(tiny, start):
    table = screen.screen(tiny(coupling_rollouts=2, bootstrap=10), start, "sudoku")
    assert set(table.surrogate) == set(NAMES)
