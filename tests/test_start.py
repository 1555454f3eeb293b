import pytest
from synthetic import responses

from asym import start
from asym.params import ParamsError
from asym.start import train_start


def test_rl_can_start_from_a_checkpoint_of_ones_own(tiny, base, root):
    run = train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert run.checkpoint.resolve() == base.checkpoint.resolve()
    again = train_start(tiny(start_model=str(base.checkpoint)), None, "sudoku", 0)
    assert again.folder == run.folder


def test_a_folder_without_a_checkpoint_is_refused(tiny, root):
    with pytest.raises(ParamsError, match=r"start_model = .*must be the folder of a checkpoint"):
        train_start(tiny(start_model=str(root)), None, "sudoku", 0)


def test_a_start_is_the_shortest_training_that_is_half_good(tiny, base, root, monkeypatch):
    p = tiny(rl_start_arm="token_averaged", rl_start_steps=0, sft_steps=4, curve_every=1)
    rates = {1: (0.1, 0.5), 2: (0.35, 0.6), 3: (0.5, 0.5), 4: (0.9, 0.9)}
    tried, unreadable = [], set()

    def measured(p, runs, *about):
        ((step, _),) = runs.items()
        tried.append(step)
        rows = responses({"token_averaged": rates[step]}, stream=step).assign(step=step)
        return rows.assign(parse_failure="no <answer>" if step in unreadable else "")

    monkeypatch.setattr(start, "measure_along", measured)
    assert train_start(p, base, "sudoku", 0).config["steps"] == 2
    assert tried == [1, 2]
    unreadable.add(2)
    assert train_start(p, base, "sudoku", 0).config["steps"] == 3
    tried.clear()
    rates[2] = rates[3] = (0.0, 1.0)
    assert train_start(p, base, "sudoku", 0).config["steps"] == 1  # none is: the one that misses least
    assert tried == [1, 2, 3, 4]
