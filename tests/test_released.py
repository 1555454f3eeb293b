"""The paper's setting in small: releases of both families with their sizes shrunk, from disk, by a study's own path."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from asym import decode as decoding
from asym import models, plan
from asym.base import train_base
from asym.data import export, load_split, task_of
from asym.decode import complete, decode
from asym.evaluate import measure
from asym.models import chat
from asym.params import ParamsError
from asym.rewards import LABELLED
from asym.rl import train_arm as train_rl
from asym.sft import SegmentCollator, train_arm
from asym.start import train_start
from asym.transcript import PERCEPTION, TAGS, compose, prefill

RELEASED = {"qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct", "internvl": "OpenGVLab/InternVL3_5-2B-HF"}
IMAGE = {"qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>\n"}
TOKENS = {"qwen3_vl": (448 // 16 // 2) ** 2, "internvl": 256}  # of a drawing


@pytest.fixture(params=RELEASED)
def p(request, released, tiny):
    """A study of a release: drawings of 448 pixels, and the whole prompt, which it has never seen."""
    changes = {"image_size": 448, "prompt_style": "full", "n_train_sft": 2, "vertices_min": 6}
    changes |= {"difficulty_sudoku": 0.0, "difficulty_graph_coloring": 0.0}
    return tiny(family=request.param, model=str(released(RELEASED[request.param])), **changes)


@pytest.fixture
def vlm(p, root):
    """(model, processor), fetched, linked and loaded as by a study."""
    return models.load(train_base(p).checkpoint, p)


@pytest.fixture
def rows(p, root):
    """Two rows to train on of each task."""
    return [row for task in p.tasks for row in load_split(p, task, "train_sft", 0)]


def encode(processor, texts, images):
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def prompts(processor, rows, begun=("", "<perception>", "", "<perception>[[1, 2")):
    """Left-padded inputs of prompts of several lengths."""
    texts = [chat(processor, row["query"], True) + start for row, start in zip(rows, begun, strict=True)]
    return encode(processor, texts, [row["image"] for row in rows])


@torch.no_grad()
def test_masking_the_image_changes_the_logits(vlm, rows):
    model, inputs = vlm[0], prompts(vlm[1], rows)
    masked = prompts(vlm[1], [row | {"image": Image.new("RGB", (448, 448), "grey")} for row in rows])
    assert torch.equal(inputs["input_ids"], masked["input_ids"])
    assert (model(**inputs).logits - model(**masked).logits)[:, -1].abs().amax(-1).min() > 1e-3


def test_the_release_has_what_the_small_models_lack(p, vlm):
    model, processor = vlm
    text = model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.head_dim * text.num_attention_heads > text.hidden_size
    assert text.vocab_size > len(processor.tokenizer)
    assert all(len(processor.tokenizer(tag)["input_ids"]) > 1 for tag in TAGS)
    assert len(list(Path(p.model).glob("*.safetensors"))) == 2
    if p.family == "qwen3_vl":
        assert len(model.config.vision_config.deepstack_visual_indexes) == 3
    else:
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_an_image_has_as_many_tokens_as_features_and_as_planned(p, vlm):
    model, processor = vlm
    for width in (448, 1344):
        inputs = encode(processor, [chat(processor, "Why?", True)], [Image.new("RGB", (width, 448))])
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert tokens == len(torch.cat(tuple(model.get_image_features(**images).pooler_output)))
        assert tokens == TOKENS[p.family] * (width // 448 if p.family == "qwen3_vl" else 1)
    small, whole = (plan.config_of(p.model_copy(update={"model": name})) for name in (p.model, RELEASED[p.family]))
    assert plan.lengths(small, p, 1).image == plan.lengths(whole, p, 1).image == TOKENS[p.family]
    if p.family == "internvl":  # by default a processor cuts it into three tiles and adds it whole
        stock = AutoProcessor.from_pretrained(p.model)
        ids = encode(stock, [chat(stock, "", True)], [Image.new("RGB", (1344, 448))])["input_ids"]
        assert (ids == model.config.image_token_id).sum() == 4 * TOKENS[p.family]


def test_the_response_follows_the_frame_of_the_family_and_only_it_has_labels(p, vlm, rows):
    processor, tokenizer = vlm[1], vlm[1].tokenizer
    frame = chat(processor, "Why?", image=True)
    assert frame == f"<|im_start|>user\n{IMAGE[p.family]}Why?<|im_end|>\n<|im_start|>assistant\n"
    assert chat(processor, "Why?", image=False) == frame.replace(IMAGE[p.family], "")
    batch = SegmentCollator(processor)(rows)
    for row, ids, labels, segments in zip(rows, *map(batch.get, ("input_ids", "labels", "segments")), strict=True):
        prompt = encode(processor, [chat(processor, row["query"], True)], [row["image"]])["input_ids"][0]
        begin = len(prompt)
        assert torch.equal(ids[:begin], prompt)
        assert (labels[:begin] == -100).all()
        assert not segments[:begin].any()
        written = labels[begin:][labels[begin:] != -100]
        assert torch.equal(written, ids[begin : begin + len(written)])
        assert tokenizer.decode(written) == row["response"] + "<|im_end|>"
        assert tokenizer.decode(ids[segments == PERCEPTION]) == prefill(row["perception"])  # ">\n" is one token


def test_a_prefilled_response_begins_with_the_tokens_of_training(vlm, rows, monkeypatch):
    model, processor = vlm
    queries, images = ([row[name] for row in rows] for name in ("query", "image"))
    starts, given = [prefill(row["perception"]) for row in rows], []

    def noting(model, inputs, *args, **limits):
        given.append(inputs)
        return decode(model, inputs, *args, **limits)

    monkeypatch.setattr(decoding, "decode", noting)
    texts = complete(model, processor, queries, images, starts, max_new_tokens=4, batch=4)
    assert all(text.startswith(start) and text != start for text, start in zip(texts, starts, strict=True))
    trained = SegmentCollator(processor)(rows)
    for ids, mask, labelled, segments in zip(
        *map(given[0].get, ("input_ids", "attention_mask")), *map(trained.get, ("input_ids", "segments")), strict=True
    ):
        end = int((segments == PERCEPTION).nonzero().max()) + 1
        assert ids[mask.bool()].tolist() == labelled[:end].tolist()


@torch.no_grad()
def test_greedy_decoding_writes_the_tokens_of_generate_and_stops_at_either_end(vlm, rows):
    model, inputs, limit = vlm[0], prompts(vlm[1], rows), 24

    def both_ways():
        ours = decode(model, inputs, 1, max_new_tokens=limit, temperature=0.0)
        stock = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return ours, [ids[: len(own)] for own, ids in zip(ours, stock.tolist(), strict=True)]

    free, stock = both_ways()
    assert free == stock
    assert len(set(map(tuple, free))) == len(rows)
    places = lambda token: {ids.index(token) if token in ids else limit for ids in free}  # noqa: E731
    token = max(set().union(*free), key=lambda token: len(places(token)))
    for end in model.generation_config.eos_token_id:
        order = torch.arange(model.config.get_text_config().vocab_size)
        order[[end, token]] = order[[token, end]]  # the end becomes as likely as a token that rows write at some time
        hook = model.get_output_embeddings().register_forward_hook(lambda *args, order=order: args[-1][..., order])
        ours, stock = both_ways()
        hook.remove()
        assert ours == stock == [[*ids[: ids.index(token)], end] if token in ids else ids for ids in free]
        assert len(set(map(len, ours))) > 1


@torch.no_grad()
def test_rows_taken_with_their_encoded_images_have_the_logits_of_the_batch(vlm, rows):
    model, inputs = vlm[0], prompts(vlm[1], rows)
    encoded, some = models.encode_images(model, inputs), torch.tensor([3, 1])
    width = inputs["input_ids"].shape[1]
    taken = model(**models.take(encoded, some, width)).logits
    torch.testing.assert_close(taken[:, -1], model(**inputs).logits[some, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("known", [True, False])
def test_how_a_release_samples_by_default_has_no_influence(vlm, rows, monkeypatch, known):
    model, processor = vlm
    monkeypatch.setattr(decoding, "known", lambda model: known)
    queries, images = ([row[name] for row in rows] for name in ("query", "image"))
    limits = {"max_new_tokens": 12, "batch": 8, "copies": 2, "temperature": 1.0}
    sampled = lambda: complete(model, processor, queries, images, **limits)  # noqa: E731
    release = model.generation_config
    assert (release.do_sample, release.top_k, release.top_p) == (True, 20, 0.8)
    release.eos_token_id += range(60)  # so that rows end early, and some are padded
    own = GenerationConfig(eos_token_id=release.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)
    texts, model.generation_config = sampled(), own
    assert sampled() == texts


def test_responses_keep_their_text_and_rewards_through_the_tokenizer(p, vlm, rows):
    tokenizer = vlm[1].tokenizer
    for row, other in zip(rows, [rows[1], rows[0], rows[3], rows[2]], strict=True):
        task = task_of(p, row["task"])
        problem = task.problem(row["ground_truth"])
        blind = compose(other["perception"], "Là, r1c2 ≠ 3:\n\n 4…", task.answer(problem))
        texts = [row["response"], blind, row["response"].removesuffix(TAGS[-1])]
        again = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts]
        assert again == texts
        paid = {reward.__name__: reward(task, [problem] * 3, again) for reward in LABELLED}
        assert paid["outcome"] == [1, 1, 0]
        assert paid["perception"] == [1, 0, 1]
        assert 0 < paid["perception_graded"][1] < 1
        assert paid["format"] == [1, 1, 0]


def test_a_release_goes_through_sft_and_rl_on_published_data(p, root, tmp_path):
    small = {"tasks": ["sudoku"], "n_train_sft": 4, "n_test": 2, "verbosity": 0, "sft_batch": 2, "sft_steps": 2}
    lora = {"dtype": "bfloat16", "lora_rank": 2, "trained_parts": ["language"], "activation_checkpointing": True}
    start = {"rl_start_arm": "ngdiff", "rl_start_verbosity": 0, "rl_start_steps": 2, "curve_every": 1}
    small |= {"rl_accumulation": 2, "rl_group": 2, "max_new_tokens": 600}  # as long as the responses
    p = p.model_copy(update=small | lora | start)
    (folder,) = export(p, tmp_path / "data")
    p = p.model_copy(update={"data": str(folder)})
    base = train_base(p)
    for arm in ("token_averaged", "ngdiff"):
        tuned = train_arm(p, base, "sudoku", arm, 0)
        assert tuned.metrics().grad_norm_perception.gt(0).all()
        adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(p.model), tuned.checkpoint)
        assert all(weights.any() for name, weights in adapted.named_parameters() if "lora_B" in name)
        assert Path(adapted.peft_config["default"].base_model_name_or_path).resolve() == Path(p.model)
    start = train_start(p, base, "sudoku", 0)
    assert start.folder == tuned.folder
    with pytest.raises(ParamsError, match="rl_prompts = 3: must be at most the 2 rows of train_rl"):
        train_rl(p.model_copy(update={"rl_prompts": 3, "n_train_rl": 3}), start, "sudoku", "alpha_0.5", 0)
    run = train_rl(p, start, "sudoku", "alpha_0.5", 0)
    assert (run.checkpoint / "adapter_model.safetensors").exists()
    assert not (run.checkpoint / "model.safetensors").exists()
    model, _ = models.load(run.checkpoint, p)  # two adapters deep
    assert {weights.dtype for name, weights in model.named_parameters()} == {torch.bfloat16}
    rows = measure(p, run, "sudoku", "rl", "alpha_0.5", 0)
    assert len(rows) == 2 * p.n_test
    assert rows.problem_id.str.startswith("sudoku/test/").all()
    assert rows[rows["mode"] == "counterfactual"].a_p.eq(1).all()
