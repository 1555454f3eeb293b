import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

from asym import credit
from asym.credit import (
    SKETCH,
    gradient_table,
    group_advantages,
    perception_mask,
    policy_gradients,
    reweighted,
    routed,
    weight_of,
)
from asym.models import as_trained, chat, part_of
from asym.params import Params
from asym.transcript import PERCEPTION, compose, segment_ids


def test_advantages_are_those_of_the_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    advantages = group_advantages(rewards, 3)
    assert advantages[3:].tolist() == [0, 0, 0]
    assert advantages[:3].tolist() == pytest.approx([(x - 1 / 3) / (3**-0.5 + 1e-4) for x in (1, 0, 0)])


def test_the_perception_mask_ends_with_the_closing_tag(vlm):
    tokenizer = vlm[1].tokenizer
    texts = [compose("[[1, 2]]", "so", "[1]"), "<perception>[[1", "</perception>", ""]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_offsets_mapping=True)
    mask = perception_mask(tokenizer, encoded["input_ids"])
    whole = [each == PERCEPTION for each in segment_ids(texts[0], encoded["offset_mapping"][0].tolist())]
    assert mask[0].tolist() == whole
    assert mask[1].all()
    assert mask[2].tolist() == [True] + [False] * (mask.shape[1] - 1)
    assert mask[3].all()


def test_a_tag_of_several_tokens_counts_to_its_last_one():
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    text = "<perception>1</perception> x"
    (row,) = perception_mask(Letters(), torch.tensor([[ord(letter) for letter in text]]))
    assert row.sum() == len("<perception>1</perception>")


def test_routed_tokens_get_their_own_reward():
    seen = torch.tensor([[True, False, False], [True, True, False]])
    found = routed(seen, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]))
    assert found.tolist() == [[1, 0.5, 0.5], [-1, -1, 2]]


def test_reweighting_is_the_weighted_mean_of_both_segments():
    generator = torch.Generator().manual_seed(0)
    written = torch.arange(7) < torch.tensor([[7], [4], [5]])
    seen = torch.arange(7) < torch.tensor([[2], [1], [0]])
    logps, outcome = torch.rand(3, 7, generator=generator), torch.tensor([1.0, -0.5, 2.0])
    n_p, n = 3, 16
    loss = (reweighted(0.3, seen, outcome, n_p, n) * logps * written).sum() / n  # the "dapo" loss
    terms = outcome[:, None] * logps
    assert loss == pytest.approx(0.3 * terms[seen].mean().item() + 0.7 * terms[written & ~seen].mean().item())
    plain = reweighted(n_p / n, seen, outcome, n_p, n)
    assert torch.allclose(plain, outcome[:, None].expand_as(plain))


@pytest.mark.parametrize(
    ("arm", "weight"), [("reweighted_0.3", 0.3), ("reweighted_1", 1.0), ("span_routed", None), ("outcome", None)]
)
def test_only_a_reweighted_arm_has_a_weight(arm, weight):
    assert weight_of(arm) == weight


def test_policy_gradients_are_those_of_the_log_likelihoods(vlm):
    model, processor = vlm
    image = Image.new("RGB", (32, 32), "white")
    data = Dataset.from_dict({"problem_id": ["x", "y"], "query": ["Why?", "How?"], "image": [image, image]})
    texts = [compose("[[1, 2]]", "so then", "[1]"), "no tags", compose("[[2]]", "so", "[2]")]
    rollouts = pd.DataFrame({"problem_id": "y", "rollout": [0, 1, 2], "completion": texts})
    rollouts["ended"] = [True, True, False]
    model = as_trained(model.eval(), Params(trained_parts=["language"]), 0)
    found = policy_gradients(model, processor, rollouts, data, 0.7, 3, "")
    assert found[["problem_id", "rollout"]].to_numpy().tolist() == [["y", 0], ["y", 1], ["y", 2]]
    assert not np.any(found.seen[1])  # it never says what it sees

    parameters = [q for name, q in model.named_parameters() if part_of(name) == "language"]
    assert not any(q.requires_grad for name, q in model.named_parameters() if part_of(name) != "language")
    generator = torch.Generator().manual_seed(3)
    total = sum(q.numel() for q in parameters)
    bucket = torch.randint(SKETCH, (total,), generator=generator, dtype=torch.int32)
    sign = torch.randint(2, (total,), generator=generator, dtype=torch.int8) * 2 - 1
    for row, text in enumerate(texts):  # from the text, without the collator
        prompt = processor(text=[chat(processor, "How?", True) + text], images=[image], return_tensors="pt")
        spans = processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        logits = model(**prompt).logits[0] / 0.7
        whole, n = prompt["input_ids"][0], len(spans)
        logps = logits[-n - 1 : -1].log_softmax(-1).gather(1, whole[-n:, None])[:, 0]
        end = logits[-1].log_softmax(-1)[processor.tokenizer.eos_token_id]
        seen = segment_ids(text, spans) if "</perception>" in text else [0] * n
        values = {"whole": logps.sum() + end * rollouts.ended[row]}
        values["seen"] = logps[torch.tensor(seen) == PERCEPTION].sum()
        for name, value in values.items():
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    torch.zeros_like(q).flatten() if g is None else g.flatten()
                    for g, q in zip(grads, parameters, strict=True)
                ]
            )
            expected = torch.zeros(SKETCH).index_add_(0, bucket, flat * sign)
            np.testing.assert_allclose(found[name][row], expected, atol=1e-4 * float(expected.abs().max()) + 1e-12)
            assert np.linalg.norm(found[name][row]) == pytest.approx(flat.norm().item(), rel=0.2)  # a hash keeps norms


def test_the_table_tells_aligned_rewards_from_noise():
    """Two rollouts a problem, the first of which saw right: its gradient holds the direction of seeing."""
    rng = np.random.default_rng(0)
    ideal = np.zeros(SKETCH)
    ideal[0] = 1.0
    records = []
    for problem in range(200):
        lucky = rng.integers(2)
        for rollout, right in enumerate((1.0, 0.0)):
            gradient = right * ideal + rng.normal(0, 0.5 / 64, SKETCH)
            about = {"problem_id": str(problem), "rollout": rollout, "whole": gradient, "seen": gradient}
            paid = {"perception": right, "same": 3 * right, "against": -right, "luck": float(rollout == lucky)}
            records.append(about | paid)
    gradients = pd.DataFrame(records).assign(task="sudoku", family="f", seed=0, ground_truth="")
    table = gradient_table(gradients, ["perception", "same", "against", "luck"], 200)
    found = table.set_index(["measure", "reward"])
    assert found.estimate["cosine", "perception"] == pytest.approx(1)
    assert found.estimate["cosine", "same"] == pytest.approx(1, abs=1e-3)
    assert found.estimate["cosine", "against"] == pytest.approx(-1, abs=1e-3)
    assert found.low["cosine", "luck"] < 0 < found.high["cosine", "luck"]
    assert found.low["signal_to_noise", "perception"] > 10
    assert found.high["signal_to_noise", "against"] < -10
    assert found.low["signal_to_noise", "luck"] < 0 < found.high["signal_to_noise", "luck"]
    assert found.n["cosine", "same"] == 200
    assert found.n["signal_to_noise", "same"] == 100


def test_a_policy_gradient_is_the_advantages_times_the_gradients():
    rng = np.random.default_rng(1)
    records = [
        {"problem_id": k // 3, "rollout": k % 3, "whole": rng.normal(size=SKETCH), "perception": float(k % 2)}
        for k in range(6)
    ]
    frame = pd.DataFrame(records).assign(seed=0)
    groups = [group for _, group in frame.groupby("problem_id")]
    first, second = credit._summed(groups, "perception", "whole")
    advantages = group_advantages(torch.tensor(frame.perception.to_numpy()), 3).numpy()
    np.testing.assert_allclose(first, sum(a * g for a, g in zip(advantages[:3], frame.whole[:3], strict=True)))
    np.testing.assert_allclose(second, sum(a * g for a, g in zip(advantages[3:], frame.whole[3:], strict=True)))


def test_the_yardstick_is_made_of_other_problems_than_it_judges():
    """A perception gradient of pure noise has no signal of its own, however well it fits itself."""
    noise = np.random.default_rng(0).normal(size=(120, SKETCH))
    rows = [
        {"problem_id": str(k // 2), "rollout": k % 2, "whole": g, "seen": g, "perception": float(k % 2)}
        for k, g in enumerate(noise)
    ]
    rows = pd.DataFrame(rows).assign(task="sudoku", family="f", seed=0, ground_truth="")
    table = gradient_table(rows, ["perception"], 200)
    signal = table[table.measure == "signal_to_noise"].iloc[0]
    assert signal.low < 0 < signal.high
