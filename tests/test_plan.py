"""What a study will need, against models that exist and arithmetic done by hand."""

import pytest
from peft import get_peft_model
from PIL import Image

from asym import models, plan
from asym.params import Params, ParamsError


def numbers(p: Params) -> dict[str, float]:
    return plan.plan(p).set_index("quantity")["value"].to_dict()


@pytest.mark.parametrize(
    ("model", "least", "most"),  # billions of parameters, as the model cards round them
    [
        ("Qwen/Qwen3-VL-2B-Instruct", 2.0, 2.3),
        ("Qwen/Qwen3-VL-4B-Instruct", 4.2, 4.6),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.6, 8.9),
        ("OpenGVLab/InternVL3_5-2B-HF", 2.25, 2.35),
        ("OpenGVLab/InternVL3_5-4B-HF", 4.65, 4.75),
        ("OpenGVLab/InternVL3_5-8B-HF", 8.45, 8.55),
    ],
)
def test_released_models_have_the_size_on_their_cards(model, least, most):
    count = plan.parameters(plan.config_of(Params(model=model)), Params())
    assert least <= (count.language + count.projector + count.vision) / 1e9 <= most


def test_a_small_model_is_counted_as_it_is(base, tiny):
    p = tiny(model=str(base.checkpoint))
    model, _ = models.load(base.checkpoint)
    count = plan.parameters(plan.config_of(p), p)
    sizes = dict.fromkeys(("language", "projector", "vision"), 0)
    for name, weights in model.named_parameters():
        sizes[models.part_of(name)] += weights.numel()
    assert count[[*sizes]].to_dict() == sizes
    assert count.trained == sum(sizes.values())
    lora = models.prepare_training(model, p.model_copy(update={"lora_rank": 2}))
    adapted = get_peft_model(model, lora)
    trained = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert plan.parameters(plan.config_of(p), p.model_copy(update={"lora_rank": 2})).trained == trained


def test_image_tokens_are_those_of_the_processor(bases, tiny):
    for family in ("qwen3_vl", "internvl"):
        p = tiny(family=family)
        _, processor = models.load(bases(family).checkpoint)
        text = models.chat(processor, "", True)
        ids = processor(text=[text], images=[Image.new("RGB", (p.image_size,) * 2)])["input_ids"][0]
        context = processor.tokenizer.convert_tokens_to_ids(models.IMAGE_TOKENS[family][1])
        assert plan.lengths(plan.config_of(p), p, 2).image == list(ids).count(context)


def test_lora_and_checkpointing_need_less_and_longer_responses_more():
    full = Params(model="Qwen/Qwen3-VL-2B-Instruct", dtype="bfloat16", prompt_style="full")
    spared = full.model_copy(update={"lora_rank": 16, "activation_checkpointing": True})
    longer = full.model_copy(update={"verbosity": 8})
    a, b, c = map(numbers, (full, spared, longer))
    assert b["memory: optimizer"] < a["memory: optimizer"] / 20
    assert b["memory: activations, SFT"] < a["memory: activations, SFT"] / 10
    assert a["memory: optimizer"] == a["memory: gradients"] == 2 * a["memory: weights"]
    assert c["work: an SFT arm"] > 2 * a["work: an SFT arm"]


def test_rl_from_a_start_with_short_traces_costs_less_and_long_contexts_more_than_in_proportion():
    p = Params(model="Qwen/Qwen3-VL-2B-Instruct", dtype="bfloat16", prompt_style="full", verbosity=4)
    long, short = (numbers(p.model_copy(update={"rl_start_verbosity": verbosity})) for verbosity in (4, 0))
    assert short["work: an SFT arm"] == long["work: an SFT arm"]
    assert short["work: an RL arm"] < long["work: an RL arm"] / 2
    assert short["memory: activations, RL"] < long["memory: activations, RL"] / 2
    small, large = (numbers(p.model_copy(update={"image_size": side})) for side in (1024, 4096))
    tokens = [sum(n[f"tokens: {part}"] for part in ("image", "prompt", "response")) for n in (small, large)]
    assert large["work: an SFT arm"] / small["work: an SFT arm"] > 1.3 * tokens[1] / tokens[0]


def test_a_model_that_is_nowhere_is_refused(monkeypatch):
    def unreachable(name, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ParamsError, match=r"model = 'x/y': .* \(no route to the hub\).*hf download x/y"):
        plan.config_of(Params(model="x/y"))
