import pandas as pd
import pytest
from synthetic import responses

from asym import rl, screen
from asym.params import ParamsError
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


def test_rl_can_start_from_a_checkpoint_of_ones_own(tiny, base, root):
    run = rl.train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert run.checkpoint.resolve() == base.checkpoint.resolve()
    again = rl.train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert again.folder == run.folder


def test_a_folder_without_a_checkpoint_is_refused(tiny, root):
    with pytest.raises(ParamsError, match=r"start_model = .*must be the folder of a checkpoint"):
        rl.train_start(tiny(start_model=str(root)), None, "sudoku", 0)


def test_a_start_is_the_shortest_training_that_is_half_good(tiny, base, root, monkeypatch):
    p = tiny(rl_start_arm="token_averaged", rl_start_steps=0, sft_steps=4, curve_every=1)
    rates = {1: (0.1, 0.5), 2: (0.35, 0.6), 3: (0.5, 0.5), 4: (0.9, 0.9)}
    tried, unreadable = [], set()

    def measured(p, runs, *about):
        ((step, _),) = runs.items()
        tried.append(step)
        rows = responses({"token_averaged": rates[step]}, stream=step).assign(step=step)
        return rows.assign(parse_failure="no <answer>" if step in unreadable else "")

    monkeypatch.setattr(rl, "measure_along", measured)
    assert rl.train_start(p, base, "sudoku", 0).config["steps"] == 2
    assert tried == [1, 2]
    unreadable.add(2)
    assert rl.train_start(p, base, "sudoku", 0).config["steps"] == 3
    tried.clear()
    rates[2] = rates[3] = (0.0, 1.0)
    assert rl.train_start(p, base, "sudoku", 0).config["steps"] == 1  # none is: the one that misses least
    assert tried == [1, 2, 3, 4]
