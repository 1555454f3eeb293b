"""Token imbalance, measured three ways on the same batches: perception's share of tokens, of loss, of gradient norm.

All three are shares of the token-averaged loss, Σ_p/n + Σ_r/n: what perception contributes to what the stock trainer
minimises. Its share of the tokens is fixed by the data; the other two say how much of the signal it really is.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from asym import models
from asym.data import load_split
from asym.params import Params
from asym.runs import Run, progress
from asym.sft import SegmentCollator, threads
from asym.transcript import PERCEPTION, REASONING


def measure_shares(
    p: Params, trained: Run, task: str, stage: str, arm: str, seed: int, step: int, batches: int = 8
) -> pd.DataFrame:
    """Shares of perception at a checkpoint, one row per batch of SFT data.

    Returns:
        Columns task, family, seed, stage, arm, step, batch, token_share, loss_share, gradient_share (0..1), and
        loss_perception, loss_reasoning (nats per token).
    """
    model, processor = models.load(trained.checkpoint)
    model.eval()
    data = load_split(p, task, "train_sft", seed)
    # The same batches for every checkpoint, and none that any arm has seen more often than others
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, p.sft_batch, shuffle=True, generator=order, collate_fn=SegmentCollator(processor))
    parameters = [q for q in model.parameters() if q.requires_grad]
    about = {"task": task, "family": p.family, "seed": seed, "stage": stage, "arm": arm, "step": step}
    rows = []
    total = min(batches, len(loader))
    with threads(p.threads), progress(f"shares {task} {arm}", total) as bar:
        for index, batch in zip(range(total), loader, strict=False):
            segments, labels = batch.pop("segments")[:, 1:], batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T - 1), 0 where ignored
            counts = [int((segments == s).sum()) for s in (PERCEPTION, REASONING)]
            sums = [(losses * (segments == s)).sum() for s in (PERCEPTION, REASONING)]
            grads = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in sums]
            norms = [torch.stack([g.norm() for g in grad if g is not None]).norm().item() for grad in grads]
            sums = [value.item() for value in sums]
            shares = {"token_share": counts, "loss_share": sums, "gradient_share": norms}
            means = {"loss_perception": sums[0] / counts[0], "loss_reasoning": sums[1] / counts[1]}
            rows.append(about | {"batch": index} | {k: v[0] / sum(v) for k, v in shares.items()} | means)
            bar.update()
    return pd.DataFrame(rows)
