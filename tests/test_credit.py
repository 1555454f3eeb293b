import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

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
from asym.models import chat, part_of
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
    assert not mask[1].any()
    assert mask[2].tolist() == [True] + [False] * (mask.shape[1] - 1)
    assert not mask[3].any()


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


def test_policy_gradients_are_those_of_the_weighted_log_likelihoods(vlm):
    model, processor = vlm
    image = Image.new("RGB", (32, 32), "white")
    data = Dataset.from_dict({"problem_id": ["x", "y"], "query": ["Why?", "How?"], "image": [image, image]})
    texts = [compose("[[1, 2]]", "so then", "[1]"), "no tags", compose("[[2]]", "so", "[2]")]
    rollouts = pd.DataFrame({"problem_id": "y", "completion": texts, "r": [1.0, 0.0, 0.5], "flat": 1.0})
    found = policy_gradients(model, processor, rollouts, data, ["r", "flat"], ["language"], 3, "")
    assert found[["problem_id", "reward"]].to_numpy().tolist() == [["y", "r"], ["y", "flat"]]
    assert not np.any(found.whole[1])
    assert not np.any(found.seen[1])

    parameters = [q for name, q in model.named_parameters() if part_of(name) == "language"]
    advantages = group_advantages(torch.tensor(rollouts.r.to_numpy()), 3)
    sums = {"whole": 0.0, "seen": 0.0}
    for text, advantage in zip(texts, advantages, strict=True):  # one by one, from the text
        prompt = processor(text=[chat(processor, "How?", True)], images=[image], return_tensors="pt")
        response = processor.tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([[*response["input_ids"], processor.tokenizer.eos_token_id]])
        types = torch.cat([prompt.pop("mm_token_type_ids"), torch.zeros_like(ids)], 1)
        whole = torch.cat([prompt.pop("input_ids"), ids], 1)
        prompt.pop("attention_mask")
        logits = model(input_ids=whole, mm_token_type_ids=types, **prompt).logits[0, -ids.shape[1] - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, ids[0][:, None])[:, 0]
        spans = [*response["offset_mapping"], (len(text), len(text))]
        seen = [s == PERCEPTION for s in segment_ids(text, spans)] if "</perception>" in text else [False] * len(ids[0])
        sums["whole"] += advantage * logps.sum()
        sums["seen"] += advantage * logps[torch.tensor(seen)].sum()
    generator = torch.Generator().manual_seed(3)
    total = sum(q.numel() for q in parameters)
    place = torch.randint(SKETCH, (total,), generator=generator)
    sign = torch.randint(2, (total,), generator=generator) * 2 - 1
    for name, value in sums.items():
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        expected = torch.zeros(SKETCH).index_add_(0, place, (flat * sign).float())
        np.testing.assert_allclose(found[name][0], expected, atol=1e-4 * float(expected.abs().max()))
        assert np.linalg.norm(found[name][0]) == pytest.approx(flat.norm().item(), rel=0.2)  # a hash keeps norms


def test_the_table_tells_aligned_rewards_from_noise():
    rng = np.random.default_rng(0)
    ideal = np.zeros(SKETCH)
    ideal[0] = 1.0
    records = []
    for problem in range(200):
        noise, other = rng.normal(0, 1 / 64, (2, SKETCH))  # norm about 1
        for reward, seen in (("perception", ideal + noise), ("half", 0.5 * ideal + other), ("none", other)):
            records.append({"problem_id": problem, "reward": reward, "whole": seen, "seen": seen})
    table = gradient_table(pd.DataFrame(records).assign(task="sudoku", family="f", seed=0), 200)
    found = table.set_index(["measure", "reward"])
    assert found.estimate["cosine", "perception"] == 1
    assert found.low["cosine", "half"] > 0.9
    assert found.low["cosine", "none"] < 0 < found.high["cosine", "none"]
    assert found.estimate["signal_to_noise", "perception"] > found.estimate["signal_to_noise", "half"] > 10
    assert found.low["signal_to_noise", "none"] < 0 < found.high["signal_to_noise", "none"]
    assert set(found.n) == {200}


def test_the_yardstick_leaves_out_the_problem_it_judges():
    """A perception gradient of pure noise has no signal of its own, however well it fits itself."""
    noise = np.random.default_rng(0).normal(size=(60, SKETCH))
    rows = [{"problem_id": k, "reward": "perception", "whole": g, "seen": g} for k, g in enumerate(noise)]
    table = gradient_table(pd.DataFrame(rows).assign(task="sudoku", family="f", seed=0), 200)
    signal = table[table.measure == "signal_to_noise"].iloc[0]
    assert abs(signal.estimate) < 0.5
