from collections import Counter

import pytest
import scipy.stats
import torch
from peft import get_peft_model

from asym import decode as decoding
from asym import models
from asym.data import load_split
from asym.decode import complete, decode, log_probs


def generate(vlm, rows, **settings) -> list[str]:
    model, processor = vlm
    return complete(model, processor, rows["query"], rows["image"], **{"max_new_tokens": 6, "batch": 8} | settings)


@pytest.fixture
def rows(tiny, root):
    return load_split(tiny(n_test=4), "sudoku", "test", 0)[:]


def test_greedy_completions_do_not_depend_on_the_batch(vlm, rows):
    assert generate(vlm, rows) == generate(vlm, rows, batch=1) == generate(vlm, rows, batch=3)


def test_greedy_completion_is_the_argmax_token_by_token(vlm, rows):
    model, processor = vlm
    (text,) = complete(model, processor, rows["query"][:1], rows["image"][:1], max_new_tokens=3, batch=1)
    inputs = processor(
        text=[models.chat(processor, rows["query"][0], True)], images=rows["image"][:1], return_tensors="pt"
    )
    banned, new = models.image_token_ids(processor), []
    for _ in range(3):
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].clone()
        logits[banned] = -torch.inf
        new.append(logits.argmax().view(1, 1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], new[-1]], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name not in inputs:  # InternVL's processor returns none
                continue
            inputs[name] = torch.cat([inputs[name], torch.full((1, 1), value)], 1)
    assert text == processor.tokenizer.decode(torch.cat(new)[:, 0], skip_special_tokens=True)


def test_sampling_repeats_with_its_seed_and_varies_without(vlm, rows):
    one, same, other = (generate(vlm, rows, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_completions_begin_with_their_prefix_and_need_no_image(vlm, rows):
    model, processor = vlm
    texts = complete(
        model, processor, ["Why?", "Why?"], [None, rows["image"][0]], ["<perception>[[1", ""], max_new_tokens=4, batch=2
    )
    assert texts[0].startswith("<perception>[[1")
    assert len(texts[0]) > len("<perception>[[1")


def test_a_policy_never_writes_an_image_token(vlm, rows):
    model, processor = vlm
    image = models.image_token_ids(processor)
    with torch.no_grad():  # the image tokens' rows of the tied embedding become the likeliest by far
        embedding = model.get_input_embeddings().weight
        embedding[image] = 50 * torch.randn(len(image), embedding.shape[1]).sign()
    inputs = prompts(vlm, rows)
    limits = {"max_new_tokens": 8, "temperature": 1.0}
    assert torch.isin(torch.tensor(decode(model, inputs, 1, **limits)), torch.tensor(image)).any()
    for way in (decode, decoding._generate):
        assert not torch.isin(
            torch.as_tensor(way(model, inputs, 1, forbidden=image, **limits)), torch.tensor(image)
        ).any()


def prompts(vlm, rows, prefixes=("", "<perception>[[1, 2", "", "<perception>")):
    """Left-padded inputs of prompts of several lengths."""
    processor = vlm[1]
    texts = [
        models.chat(processor, query, True) + prefix for query, prefix in zip(rows["query"], prefixes, strict=True)
    ]
    return processor(text=texts, images=rows["image"], padding=True, return_tensors="pt")


@torch.no_grad()
def both_ways(model, inputs, copies=1, **limits):
    """What `decode` and transformers' `generate` write, without what follows an end."""
    limits = {"temperature": 0.0} | limits
    ours, stock = (way(model, inputs, copies, **limits) for way in (decode, decoding._generate))
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    first = lambda ids: next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))  # noqa: E731
    return ours, [ids[: first(ids)] for ids in torch.as_tensor(stock).tolist()]


def test_decoding_writes_the_tokens_of_generate(vlm, rows):
    ours, stock = both_ways(vlm[0], prompts(vlm, rows), max_new_tokens=40, forbidden=[5, 7])
    assert ours == stock
    assert len({tuple(ids) for ids in ours}) > 1


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_that_end_leave_without_a_trace(vlm, rows, copies):
    model, inputs = vlm[0], prompts(vlm, rows)
    free, _ = both_ways(model, inputs, max_new_tokens=40, forbidden=[])
    lengths = lambda token: {ids.index(token) if token in ids else 40 for ids in free}  # noqa: E731
    model.generation_config.eos_token_id = max(set().union(*free), key=lambda token: len(lengths(token)))
    ours, stock = both_ways(model, inputs, copies, max_new_tokens=40, forbidden=[])
    assert ours == stock
    assert len(set(map(len, ours))) > 1
    assert ours == [ids for ids in ours[::copies] for _ in range(copies)]


def test_prompts_without_images_decode_alike_after_one_with_an_image(vlm, rows):
    model, processor = vlm
    both_ways(model, prompts(vlm, rows), max_new_tokens=2, forbidden=[])  # leaves the image's places behind
    texts = [models.chat(processor, query, False) for query in ("Why?", "Why is that, and for how long?")]
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    ours, stock = both_ways(model, inputs, max_new_tokens=30, forbidden=[])
    assert ours == stock


def test_an_adapter_decodes_as_it_generates(tiny, vlm, rows):
    model, _ = vlm
    adapted = get_peft_model(model, models.prepare_training(model, tiny(lora_rank=4)))
    with torch.no_grad():
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:
                weights.copy_(torch.randn_like(weights))
    inputs = prompts(vlm, rows)
    ours, stock = both_ways(adapted, inputs, max_new_tokens=20, forbidden=[])
    with adapted.disable_adapter():
        plain, _ = both_ways(adapted, inputs, max_new_tokens=20, forbidden=[])
    assert ours == stock != plain


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_follow_the_distribution_of_the_model(vlm, rows, temperature):
    """Of 4000 samples of one prompt, the first token's counts fit the model's probabilities (chi-squared)."""
    model, n = vlm[0], 4000
    inputs = prompts(vlm, {name: values[:1] for name, values in rows.items()}, [""])
    torch.manual_seed(0)
    with torch.no_grad():
        expected = n * (model(**inputs).logits[0, -1].double() / temperature).softmax(-1).numpy()
        drawn = decode(model, inputs, n, max_new_tokens=1, temperature=temperature)
    counted = Counter(token for (token,) in drawn)
    likely = [token for token, count in enumerate(expected) if count >= 5]
    found = [counted[token] for token in likely]
    rest = (n - sum(found), n - sum(expected[likely]))
    test = scipy.stats.chisquare([*found, rest[0]], [*expected[likely], rest[1]])
    assert test.pvalue > 0.01


def test_second_tokens_follow_the_first(vlm, rows):
    """Sampled sequences are as likely as the model says: mean log-likelihood ≈ minus the mean entropy on their path."""
    model, n = vlm[0], 2000
    barred = [model.generation_config.eos_token_id, *models.image_token_ids(vlm[1])]  # no row ends early
    inputs = prompts(vlm, {name: values[:1] for name, values in rows.items()}, [""])
    torch.manual_seed(1)
    with torch.no_grad():
        drawn = torch.tensor(decode(model, inputs, n, max_new_tokens=4, temperature=1.0, forbidden=barred))
        whole = {name: values.repeat(n, *[1] * (values.ndim - 1)) for name, values in inputs.items()}
        whole["input_ids"] = torch.cat([whole["input_ids"], drawn], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name not in whole:
                continue
            whole[name] = torch.cat([whole[name], torch.full_like(drawn, value)], 1)
        logits = model(**whole).logits[:, -5:-1]
        logits[..., barred] = -torch.inf
        logp = logits.log_softmax(-1)
    likelihood = logp.gather(-1, drawn[..., None])[..., 0]
    surprise = likelihood + torch.special.entr(logp.exp()).sum(-1)  # of mean zero if drawn from the model
    assert abs(surprise.mean(0) / (surprise.std(0) / n**0.5)).max() < 3.5


def test_log_probabilities_are_those_of_a_plain_pass(vlm, rows, monkeypatch):
    """Of prompts of unequal length and completions of any, with gradients where they are asked for."""
    model, processor = vlm
    texts = [models.chat(processor, query, True) for query in ("Why?", rows["query"][0])]
    images, side = rows["image"][:2], processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "left"
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    processor.tokenizer.padding_side = side
    assert not inputs["attention_mask"].all()
    prompt, lengths = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([4, 7, 1, 0, 3, 1])
    moving = torch.tensor([True, False, True, True, True, False])
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(20, 60, (6, 7), generator=generator) * (torch.arange(7) < lengths[:, None])
    monkeypatch.setattr(models, "TOGETHER", 8)
    found, entropies = log_probs(model, dict(inputs), prompt, completions, lengths, moving, temperature=0.7)
    for row, length in enumerate(lengths.tolist()):
        alone = processor(text=[texts[prompt[row]]], images=[images[prompt[row]]], return_tensors="pt")
        alone["input_ids"] = torch.cat([alone["input_ids"], completions[row : row + 1, :length]], 1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in alone:  # InternVL's processor returns no types
                alone[name] = torch.cat([alone[name], torch.full((1, length), value)], 1)
        scores = (model(**alone).logits[0, -length - 1 : -1] / 0.7).log_softmax(-1)
        expected = scores.gather(1, completions[row, :length, None])[:, 0]
        torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropies[row, :length], -(scores.exp() * scores).sum(-1), rtol=1e-4, atol=1e-5)
        assert not found[row, length:].any()
        weights = model.get_output_embeddings().weight
        grads = [torch.autograd.grad(each.sum(), weights, retain_graph=True)[0] for each in (found[row], expected)]
        torch.testing.assert_close(grads[0], grads[1] * moving[row], rtol=1e-3, atol=1e-4)


def test_attention_that_takes_no_boolean_mask_is_not_known(vlm, rows):
    model = vlm[0]
    before = generate(vlm, rows)
    model.set_attn_implementation("eager")
    assert not decoding.known(model)
    assert generate(vlm, rows) == before


def test_an_unknown_model_generates_the_same(vlm, rows, monkeypatch):
    known = generate(vlm, rows, copies=2)
    monkeypatch.setattr(decoding, "KNOWN", ())
    monkeypatch.setattr(decoding, "decode", None)
    assert generate(vlm, rows, copies=2) == known
