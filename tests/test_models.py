from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from asym import models
from asym.data import build_split
from asym.models import (
    IMAGE_TOKENS,
    build_model,
    build_processor,
    build_tokenizer,
    chat,
    image_token_ids,
    load,
    prepare_training,
)
from asym.params import Params, ParamsError
from asym.transcript import TAGS

WIDTH = {"hidden_size": 128, "layers": 4, "heads": 4, "vision_hidden_size": 96, "vision_layers": 3}
FAMILIES = {
    "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
    "internvl": (InternVLForConditionalGeneration, InternVLProcessor),
}
patient = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


@pytest.fixture(scope="module")
def texts(tiny):
    return [
        text for name in ("sudoku", "graph_coloring") for text in build_split(tiny(), name, "train_sft", 0)["response"]
    ]


@pytest.fixture
def inputs(vlm):
    return prompt(vlm[1], [Image.linear_gradient("L").resize((32, 32)).convert("RGB")])


def prompt(processor, images, query="Solve the sudoku in the image."):
    text = [chat(processor, query, image=True) for _ in images]
    return processor(text=text, images=images, return_tensors="pt", padding=True)


@torch.inference_mode()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def wrapped(model, rank=2):
    """The model with a LoRA adapter that does something."""
    adapted = get_peft_model(model, prepare_training(model, Params().model_copy(update={"lora_rank": rank})))
    torch.manual_seed(rank)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_study_has_a_real_model_of_one_to_two_million_parameters(texts, family):
    p = Params(family=family).model_copy(update=WIDTH)
    processor = build_processor(texts, p)
    model = build_model(processor, p, 0)
    assert (type(model), type(processor)) == FAMILIES[family]
    assert 1_000_000 < model.num_parameters() < 2_000_000
    out = model(**prompt(processor, [Image.new("RGB", (64, 64))]))
    assert out.logits.isfinite().all()


def test_weights_depend_on_the_seed_alone(texts, tiny):
    processor = build_processor(texts, tiny())
    one, same, other = (build_model(processor, tiny(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_model_is_the_same_through_the_auto_classes(vlm, inputs, tmp_path):
    model, processor = vlm
    models.save(model, processor, tmp_path)
    again, processor_again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    assert (type(again), type(processor_again)) == (type(model), type(processor))
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    inputs_again = prompt(processor_again, [image])
    assert all(torch.equal(inputs[name], inputs_again[name]) for name in inputs)
    assert torch.equal(logits(model, inputs), logits(again, inputs_again))
    assert again.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("size", [32, 64, 100])
def test_every_image_becomes_as_many_tokens_as_features(vlm, size):
    model, processor = vlm
    inputs = prompt(processor, [Image.new("RGB", (size, size))] * 2)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    features = model.get_image_features(**images).pooler_output
    tokens = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert tokens == len(torch.cat(tuple(features)))
    if size == 32 or "image_grid_thw" in inputs:  # InternVL cuts a larger image into tiles
        assert tokens == 2 * (32 // 8 // 2) ** 2


def test_masking_the_image_changes_the_logits(vlm, inputs):
    model, _ = vlm
    masked = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    image = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
    with_image, without = logits(model, inputs), logits(model, masked)
    assert (with_image[:, image:] != without[:, image:]).any(-1).all()
    torch.testing.assert_close(with_image[:, :image], without[:, :image])  # causal: what comes before cannot know


def test_padding_on_the_left_changes_nothing(vlm, inputs):
    model, processor = vlm
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    longer = "Transcribe the image, please, and be careful."
    text = [chat(processor, query, image=True) for query in (longer, "Solve the sudoku in the image.")]
    both = processor(text=text, images=[image, image], return_tensors="pt", padding=True)
    assert both["attention_mask"][1, 0] == 0
    torch.testing.assert_close(logits(model, both)[1, -1], logits(model, inputs)[0, -1], atol=1e-5, rtol=1e-4)


def test_the_chat_frame_is_that_of_the_family(vlm):
    frame = chat(vlm[1], "Why?", image=True)
    image = {"qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>\n"}
    image = image[vlm[0].config.model_type]
    assert frame == f"<|im_start|> user\n{image}Why?<|im_end|>\n<|im_start|> assistant\n"
    assert chat(vlm[1], "Why?", image=False) == frame.replace(image, "")


def test_image_tokens_are_single_tokens_a_policy_must_not_write(vlm):
    model, processor = vlm
    ids = image_token_ids(processor)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == list(IMAGE_TOKENS[model.config.model_type])
    assert model.config.image_token_id in ids
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id} & set(ids)


# The tokenizer


def tokenizer_of(texts=("<perception>[[1, 2]]</perception> row 1 2",)):
    return build_tokenizer(texts, "qwen3_vl")


TOKENIZER = tokenizer_of()


@patient
@given(st.text())
@example("\ufeff a  b\r\n\t\u3000")
@example("e\u0301 é ﬁ ½")
@example("don't , . ! ?")
def test_the_tokenizer_loses_nothing(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert TOKENIZER.batch_decode([TOKENIZER(text)["input_ids"]]) == [text]


def test_every_response_of_the_tasks_survives_and_stays_short(texts):
    tokenizer = tokenizer_of(texts)
    assert len(tokenizer) <= models.VOCABULARY + len(TAGS)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) < len(text) / 2


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_one_ordinary_token_wherever_it_stands(tag):
    (tag_id,) = TOKENIZER(tag)["input_ids"]
    assert TOKENIZER(f"a{tag}[[1")["input_ids"].count(tag_id) == 1
    assert TOKENIZER.decode([tag_id], skip_special_tokens=True) == tag


# LoRA


@pytest.mark.parametrize("parts", [["language"], ["projector"], ["vision"], ["language", "vision"]])
def test_training_is_limited_to_some_parts_with_and_without_lora(tiny, vlm, parts):
    model, names = vlm[0], {"language": "language_model", "projector": "merger", "vision": "visual"}
    if model.config.model_type == "internvl":
        names |= {"projector": "multi_modal_projector", "vision": "vision_tower"}
    assert prepare_training(model, tiny(trained_parts=parts)) is None
    for adapted in (model, get_peft_model(model, prepare_training(model, tiny(trained_parts=parts, lora_rank=2)))):
        trained = [name for name, q in adapted.named_parameters() if q.requires_grad]
        found = {next(part for part in ("projector", "vision", "language") if names[part] in name) for name in trained}
        assert found == set(parts)
        assert not any("lm_head" in name for name in trained)


def test_lora_reaches_language_and_vision_and_is_none_at_rank_0(vlm):
    assert prepare_training(vlm[0], Params()) is None
    names = [name for name, q in wrapped(vlm[0]).named_parameters() if q.requires_grad]
    assert all("lora_" in name for name in names)
    assert any(models.part_of(name) == "vision" for name in names)
    assert any("language_model" in name for name in names)


def test_number_format_and_attention_are_those_asked_for(base, tiny):
    model, _ = load(base.checkpoint, tiny(dtype="bfloat16", attention="eager"))
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    assert model.config.get_text_config()._attn_implementation == "eager"
    assert {weights.dtype for weights in load(base.checkpoint, tiny())[0].parameters()} == {torch.float32}


def test_a_model_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(name, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(models, "snapshot_download", unreachable)
    with pytest.raises(ParamsError, match=r"model = 'x/y': .* \(no route to the hub\).*hf download x/y"):
        models.fetch("x/y")
    with pytest.raises(ParamsError, match=r"the folder .* lacks config.json, \*.safetensors, tokenizer\*"):
        models.fetch(str(tmp_path))


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (300, 100)])
def test_an_image_of_any_shape_is_one_tile_for_internvl(bases, shape):
    _, processor = load(bases("internvl").checkpoint)
    ids = prompt(processor, [Image.new("RGB", shape)])["input_ids"][0].tolist()
    context = processor.tokenizer.convert_tokens_to_ids(models.IMAGE_TOKENS["internvl"][1])
    assert ids.count(context) == processor.image_seq_length


def test_a_missing_package_is_a_plain_error(base, tiny, monkeypatch):
    def lacking(folder):
        raise ImportError("GotOcr2ImageProcessor requires the Torchvision library")

    monkeypatch.setattr(models.AutoProcessor, "from_pretrained", lacking)
    with pytest.raises(ParamsError, match="requires the Torchvision library"):
        load(base.checkpoint, tiny())


def test_a_missing_part_of_the_weights_is_named(vlm, tmp_path, monkeypatch):
    model, processor = vlm
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    first, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    assert models.fetch(str(tmp_path)) == tmp_path
    first.unlink()
    with pytest.raises(ParamsError, match=f"lacks {first.name}"):
        models.fetch(str(tmp_path))
    monkeypatch.setattr(models, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ParamsError, match=f"model = 'x/y': the folder .* lacks {first.name}"):
        models.fetch("x/y")


def test_weights_that_broke_off_are_a_plain_error(vlm, tmp_path):
    models.save(*vlm, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ParamsError, match=r"is no checkpoint that can be read so \(SafetensorError"):
        load(tmp_path)


def test_weights_that_are_missing_are_a_plain_error_not_random_ones(vlm, tmp_path):
    models.save(*vlm, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(
        {name: each for name, each in weights.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ParamsError, match=r": its files lack 1 of the model's weights: \S+q_proj\.weight$"):
        load(tmp_path)


@pytest.mark.parametrize("parts", [["language"], ["projector", "vision"]])
def test_what_training_would_move_has_gradients_and_activations_may_be_recomputed(vlm, inputs, tiny, parts):
    model, _ = vlm
    model.eval()
    plain = models.as_trained(model, tiny(trained_parts=parts), 0)
    found = torch.autograd.grad(plain(**inputs).logits.logsumexp(-1).sum(), trainable(plain), allow_unused=True)
    again = models.as_trained(model, tiny(trained_parts=parts, activation_checkpointing=True), 0)
    assert again.training
    anew = torch.autograd.grad(again(**inputs).logits.logsumexp(-1).sum(), trainable(again), allow_unused=True)
    for one, other in zip(found, anew, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    adapted = models.as_trained(model, tiny(trained_parts=parts, lora_rank=2), 0)
    names = [name for name, weights in adapted.named_parameters() if weights.requires_grad]
    assert names
    assert all("lora_" in name and models.part_of(name) in parts for name in names)


def trainable(model):
    return [weights for weights in model.parameters() if weights.requires_grad]


def test_a_saved_adapter_comes_back_merged(vlm, inputs, tmp_path):
    model, processor = vlm
    plain = logits(model, inputs)
    adapted = wrapped(model)
    models.save(adapted, processor, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    merged, _ = load(tmp_path)
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged, inputs), logits(adapted, inputs), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(merged, inputs), plain, atol=1e-3)


def test_an_update_too_small_for_bfloat16_is_kept_beside_the_weights_and_lost_in_them(vlm, inputs, tmp_path):
    model, processor = vlm
    adapted = wrapped(model)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data *= 1e-4
    models.save(adapted, processor, tmp_path)
    half = Params().model_copy(update={"dtype": "bfloat16"})
    merged, apart = (load(tmp_path, half, merge=merge)[0] for merge in (True, False))
    before = {name: weight.bfloat16() for name, weight in adapted.get_base_model().named_parameters()}
    after, saved, seen = dict(merged.named_parameters()), dict(adapted.named_parameters()), 0
    for name, module in apart.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        name, seen = name.removeprefix("base_model.model."), seen + 1
        update = module.get_delta_weight("default")
        assert update.dtype == torch.float32
        a, b = (saved[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
        torch.testing.assert_close(update, 2 * b @ a)
        rounded = after[f"{name}.weight"].float() - before[f"{name}.base_layer.weight"].float()
        assert (rounded * update).sum() < 0.5 * (update**2).sum()
    assert seen
    assert logits(apart, inputs).isfinite().all()


def test_an_adapter_trained_on_a_merged_adapter_keeps_both(vlm, inputs, tmp_path):
    """RL with LoRA starts from an SFT checkpoint with LoRA."""
    model, processor = vlm
    models.save(wrapped(model, rank=2), processor, tmp_path / "sft")
    start, processor = load(tmp_path / "sft")
    trained = wrapped(start, rank=3)
    models.save(trained, processor, tmp_path / "rl")
    again, _ = load(Path(tmp_path / "rl"))
    torch.testing.assert_close(logits(again, inputs), logits(trained, inputs), atol=1e-5, rtol=1e-4)
