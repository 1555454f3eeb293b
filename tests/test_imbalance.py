import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from synthetic import responses

from asym import models
from asym.data import load_split
from asym.imbalance import distinct, dose_response, doses, measure_shares, on_every_axis, share_predicts
from asym.params import Params
from asym.sft import SegmentCollator
from asym.transcript import PERCEPTION, REASONING

WHERE = {"stage": "base", "arm": "base", "seed": 0, "step": 0}


def test_shares_of_one_batch_are_what_two_full_backwards_give(tiny, base, root):
    p = tiny(n_train_sft=4, sft_batch=4)
    rows = measure_shares(p, base, "sudoku", **WHERE)
    model, processor = models.load(base.checkpoint)
    batch = SegmentCollator(processor)(list(load_split(p, "sudoku", "train_sft", 0)))
    segments, labels = batch.pop("segments")[:, 1:], batch.pop("labels")[:, 1:]
    log_probs = F.log_softmax(model(**batch).logits[:, :-1], -1)
    losses, norms, counts = [], [], []
    for segment in (PERCEPTION, REASONING):
        of_segment = segments == segment
        loss = -log_probs[of_segment].gather(1, labels[of_segment][:, None]).sum()
        model.zero_grad()
        loss.backward(retain_graph=True)
        flat = torch.cat([q.grad.flatten() for q in model.parameters() if q.grad is not None])
        counts.append(of_segment.sum().item())
        losses.append(loss.item())
        norms.append(flat.norm().item())
    assert len(rows) == 1
    (row,) = rows.to_dict("records")
    assert row["token_share"] == pytest.approx(counts[0] / sum(counts))
    assert row["loss_share"] == pytest.approx(losses[0] / sum(losses), rel=1e-4)
    assert row["gradient_share"] == pytest.approx(norms[0] / sum(norms), rel=1e-4)
    assert row["loss_perception"] == pytest.approx(losses[0] / counts[0], rel=1e-4)
    assert row["loss_reasoning"] == pytest.approx(losses[1] / counts[1], rel=1e-4)
    assert 0 < row["gradient_share"] < 1
    assert row["gradient_share"] != pytest.approx(row["token_share"], rel=0.05)
    assert {name: row[name] for name in WHERE} | {"task": "sudoku", "family": "qwen3_vl"} == {
        **WHERE,
        **{"task": "sudoku", "family": "qwen3_vl"},
    }


@pytest.mark.parametrize("rank", [0, 2])
def test_every_checkpoint_sees_the_same_batches(tiny, base, root, rank):
    p = tiny(n_train_sft=8, sft_batch=2, lora_rank=rank)
    one, same = (measure_shares(p, base, "graph_coloring", **WHERE, batches=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, same)
    assert one["batch"].tolist() == [0, 1, 2]
    assert one["token_share"].nunique() > 1
    assert one["gradient_share"].between(0, 1, inclusive="neither").all()


def test_doses_turn_one_knob_each_and_hold_the_study_itself(tiny):
    p = tiny(dose_verbosity=[0, 4], dose_variation=[1.0], dose_difficulty=[0.2], difficulty_sudoku=0.1)
    settings = doses(p, "sudoku")
    assert list(settings) == [
        *(("length", k) for k in (0, 1, 4)),
        ("entropy", 1),
        *(("difficulty", k) for k in (0.1, 0.2)),
    ]
    changed = {dose: {k for k, v in q.model_dump().items() if v != getattr(p, k)} for dose, q in settings.items()}
    assert changed["length", 4] == {"verbosity", "max_new_tokens"}
    assert settings["length", 4].max_new_tokens == p.max_new_tokens * 5 // 2
    assert changed["difficulty", 0.2] == {"difficulty_sudoku"}
    assert settings["length", 1] == settings["entropy", 1.0] == settings["difficulty", 0.1] == p
    assert ("difficulty", 0.5) in doses(p, "graph_coloring")
    assert doses(tiny(dose_verbosity=[]), "sudoku") == {}


def dosed(rates: dict, level: float, own: bool = False, axis: str = "length") -> tuple[pd.DataFrame, dict]:
    """Rows of a dose and what one step of token-averaged training logged."""
    step = {"task": "sudoku", "axis": axis, "level": level, "token_share": 0.2, "loss_perception": 1.0}
    step |= {"loss_reasoning": 2.0, "grad_norm_perception": 3.0, "grad_norm_reasoning": 1.0}
    return responses(rates).assign(axis=axis, level=level, own=own), step


def test_dose_response_is_gap_lag_and_gain_beside_the_shares():
    """Losses and norms weighed by the tokens' share: 0.2 · 1 against 0.8 · 2, and 0.2 · 3 against 0.8 · 1."""
    rows, step = dosed({"token_averaged": (0.4, 0.9), "ngdiff": (0.8, 0.9)}, 2.0)
    table = dose_response(rows, pd.DataFrame([step])).set_index("response")
    for response, (more, less) in {
        "gap": ("token_averaged a_r", "token_averaged a_p"),
        "lag": ("ngdiff a_p", "token_averaged a_p"),
        "gain": ("ngdiff a", "token_averaged a"),
    }.items():
        assert table.estimate[response] == pytest.approx(table.estimate[more] - table.estimate[less])
    assert table.loc["gap", ["token_share", "loss_share", "gradient_share"]].tolist() == pytest.approx(
        [0.2, 1 / 9, 3 / 7]
    )
    assert table.estimate["ngdiff parse_failure"] == 0
    assert table.low["gap"] < table.estimate["gap"] < table.high["gap"]


def test_the_share_that_falls_as_the_lag_grows_is_found():
    """Five doses of length, the study's own among them and once more on another axis."""
    parts, steps = [], []
    for level, seen in enumerate((0.8, 0.65, 0.5, 0.35, 0.2)):
        rows, step = dosed({"token_averaged": (seen, 0.9), "ngdiff": (0.8, 0.9)}, float(level), own=level == 2)
        parts.append(rows)
        steps.append(step | {"token_share": 0.3 - 0.05 * level, "loss_perception": [1, 5, 2, 9, 3][level]})
    parts.append(parts[2].assign(axis="difficulty", level=0.1))
    steps.append(steps[2] | {"axis": "difficulty", "level": 0.1})
    table = distinct(dose_response(pd.concat(parts), pd.DataFrame(steps), resamples=20))
    assert (table.response == "lag").sum() == 5
    both = share_predicts(table)
    assert set(both.response) == {"lag", "gap"}
    found = both[both.response == "lag"].drop(columns="response").set_index(["over", "share"])
    assert found.loc[("text", "token_share"), ["rho", "p", "doses"]].tolist() == pytest.approx([-1, 1 / 120, 5])
    assert found.rho["text", "loss_share"] > -1
    assert found.loc["text"].equals(found.loc["all"])


def test_shares_of_tokens_that_differ_by_a_hair_are_ties():
    """Along entropy the tokens' share is meant to stand still; which dose has a millionth more is no ranking."""
    parts, steps = [], []
    for level, seen in enumerate((0.8, 0.6, 0.4, 0.2)):
        rows, step = dosed({"token_averaged": (seen, 0.9), "ngdiff": (0.8, 0.9)}, float(level), axis="entropy")
        parts.append(rows)
        steps.append(step | {"token_share": 0.2 - 1e-6 * level, "grad_norm_perception": 3.0 - level})
    found = share_predicts(dose_response(pd.concat(parts), pd.DataFrame(steps), resamples=20))
    found = found[(found.response == "lag") & (found.over == "all")].set_index("share")
    assert np.isnan(found.rho["token_share"])
    assert found.rho["gradient_share"] == pytest.approx(-1)


def test_the_studys_own_dose_is_put_on_every_axis_that_has_others():
    p = Params().model_copy(update={"verbosity": 1, "difficulty_sudoku": 0.1})
    rates = {"token_averaged": (0.5, 0.9)}
    own = dosed(rates, 1.0, own=True)[0]
    longer, harder = dosed(rates, 2.0)[0], dosed(rates, 0.3, axis="difficulty")[0]
    kept = pd.concat([longer, harder, own])
    found = on_every_axis(kept, p)
    assert on_every_axis(found, p).equals(found)
    places = found.groupby(["axis", "level", "own"]).size()
    assert places.to_dict() == {
        ("length", 1.0, True): len(own),
        ("length", 2.0, False): len(longer),
        ("difficulty", 0.1, True): len(own),
        ("difficulty", 0.3, False): len(harder),
    }
    assert on_every_axis(own, p).equals(own)


def test_the_gradient_share_is_that_of_the_weights_that_are_trained(tiny, base, root):
    """With the language part alone trained, g_p has fewer coordinates; tokens and losses are the same."""
    choices = (["language", "projector", "vision"], ["language"])
    rows = [measure_shares(tiny(n_train_sft=4, trained_parts=parts), base, "sudoku", **WHERE) for parts in choices]
    assert (rows[0].gradient_share > rows[1].gradient_share + 1e-4).all()
    assert rows[0][["token_share", "loss_share"]].equals(rows[1][["token_share", "loss_share"]])
