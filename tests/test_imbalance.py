import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from asym import models
from asym.data import load_split
from asym.imbalance import measure_shares
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


def test_every_checkpoint_sees_the_same_batches(tiny, base, root):
    p = tiny(n_train_sft=8, sft_batch=2)
    one, same = (measure_shares(p, base, "graph_coloring", **WHERE, batches=3) for _ in range(2))
    pd.testing.assert_frame_equal(one, same)
    assert one["batch"].tolist() == [0, 1, 2]
    assert one["token_share"].nunique() > 1
