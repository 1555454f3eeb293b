"""What a study will need, against models that exist and arithmetic done by hand."""

from dataclasses import fields

import pandas as pd
import pytest
from peft import get_peft_model
from PIL import Image
from trl import GRPOConfig

from asym import models, plan
from asym.params import Params, ParamsError
from asym.runs import repo_root

ONE, EIGHT = plan.CARDS[plan.LARGE], plan.CARDS["8 x 80 GB (A100)"]
FILES = [path for family in ("qwen3_vl", "internvl") for path in sorted(repo_root().glob(f"params/{family}_*.yaml"))]


def numbers(p: Params) -> dict[str, float]:
    return plan.plan(p).set_index("quantity")["value"].to_dict()


@pytest.fixture(scope="module")
def paper() -> Params:
    """A study of the paper's size; batches are those the arithmetic below is done for."""
    p = Params.load(repo_root() / "params" / "qwen3_vl_2b_sudoku.yaml")
    return p.model_copy(update={"eval_batch": 32, "surrogates": ["group_agreement"]})


@pytest.fixture(scope="module")
def sizes(paper) -> plan.Sizes:
    return plan.Sizes(paper)


@pytest.fixture
def held(paper, sizes):
    """GB of one part of the memory, on so many cards, with changes that leave the sizes as they are."""

    def found(part: str, card: plan.Card = ONE, **changes) -> float:
        return plan.memory(paper.model_copy(update=changes), sizes, card)[part][0] / plan.GB

    return found


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
    assert b["memory: activations, SFT"] < a["memory: activations, SFT"] / 5
    assert a["memory: optimizer"] == a["memory: gradients"] == 2 * a["memory: weights"]
    assert c["work: an SFT arm"] > 2 * a["work: an SFT arm"]


def test_rl_from_a_start_with_short_traces_costs_less_and_long_contexts_more_than_in_proportion():
    p = Params(model="Qwen/Qwen3-VL-2B-Instruct", dtype="bfloat16", prompt_style="full", verbosity=4)
    long, short = (numbers(p.model_copy(update={"rl_start_verbosity": verbosity})) for verbosity in (4, 0))
    assert short["work: an SFT arm"] == long["work: an SFT arm"]
    assert short["work: an RL arm"] < long["work: an RL arm"] / 2
    small, large = (numbers(p.model_copy(update={"image_size": side})) for side in (1024, 4096))
    tokens = [sum(n[f"tokens: {part}"] for part in ("image", "prompt", "response")) for n in (small, large)]
    assert large["work: an SFT arm"] / small["work: an SFT arm"] > 1.3 * tokens[1] / tokens[0]


def test_memory_of_training_by_hand(paper, sizes, held):
    limit = (384 / 32) ** 2 + sizes.length.prompt + 9216
    attention = 3 * 2048 + 2048 + 2 * 1024 + 2 * 2048  # into and out of the products for queries, keys, values, output
    adapted = attention + 3 * (2048 + 6144)
    # The input of every layer in 16 bits, one layer whole, and what its adapters take and give in 32 bits
    token = 28 * 2048 * 2 + 34 * 2048 + 4 * adapted
    assert held("activations, SFT") == pytest.approx(8 * limit * token / 1e9)
    assert held("activations, SFT", EIGHT) == pytest.approx(limit * token / 1e9)
    assert held("activations, SFT", EIGHT, sft_batch=4) == pytest.approx(limit * token / 1e9)  # a response at least
    # 128 rollouts in 64 passes of all processes: two in each, on one card as on eight
    assert held("activations, RL") == held("activations, RL", EIGHT) == pytest.approx(2 * limit * token / 1e9)
    assert held("activations, RL", EIGHT, rl_accumulation=4) == 16 * held("activations, RL", rl_accumulation=128)
    one = limit * (token + 3 * 4 * 151_936) + 3 * 4 * sizes.n.trained
    assert held("one response with its gradients") == pytest.approx(one / 1e9)
    assert held("gradients") == held("optimizer") == pytest.approx(2 * 4 * sizes.n.trained / 1e9)


def test_memory_of_writing_by_hand(sizes, held):
    response = sizes.limit * 2 * 28 * 8 * 128 * 2 / 1e9  # keys and values of 28 layers with 8 heads of 128, 16 bits
    assert held("keys and values, evaluation") == held("keys and values, evaluation", EIGHT)
    assert held("keys and values, evaluation") == pytest.approx(32 * response)
    for at_once, changes in {32: {}, 24: {"eval_batch": 31}, 8: {"eval_batch": 5}, 128: {"eval_batch": 500}}.items():
        assert held("keys and values, RL", **changes) == pytest.approx(at_once * response)
    assert held("keys and values, RL", EIGHT) == pytest.approx(16 * response)
    assert held("keys and values, RL", vllm=True) == held("vLLM's pool") == 0
    share = {field.name: field.default for field in fields(GRPOConfig)}["vllm_gpu_memory_utilization"]
    assert held("vLLM's pool", vllm=True) == pytest.approx(share * 80)


def test_surrogates_that_ask_the_model_need_memory_in_the_middle_of_training(paper, sizes, held):
    blind, dependent = {"surrogates": ["self_blindfold"]}, {"surrogates": ["image_dependence"]}
    assert held("surrogates, RL") == 0
    assert held("surrogates, RL", **blind) == held("keys and values, evaluation")
    assert held("surrogates, RL", **dependent) == held("logits, screening")
    prefix = sizes.length[["image", "prompt", "perception"]].sum()
    assert held("logits, screening") == pytest.approx(32 * prefix * 3 * 4 * 151_936 / 1e9)
    assert held("surrogates, RL", EIGHT, **blind) == pytest.approx(held("surrogates, RL", **blind) / 2)  # 16 rollouts
    few = paper.model_copy(update={"rl_prompts": 1, "sft_batch": 1})  # then its answers are not the most
    assert plan.most(plan.memory(few, sizes, ONE)) == sizes.weights + plan.GB * held("keys and values, evaluation")
    trained = sum(plan.GB * held(part) for part in ("gradients", "optimizer", "keys and values, RL"))
    assert plan.most(plan.memory(paper, sizes, ONE)) == pytest.approx(sizes.weights + trained)


def test_writing_takes_the_larger_of_launches_and_bandwidth(paper, sizes):
    length = sizes.length
    bound = 9216 * 28 * plan.LAYER_STEP / 3600  # a batch of few: as many steps as the longest response has tokens
    assert plan.writing(paper, sizes, ONE, length, 32, 32) == pytest.approx(bound)
    assert plan.writing(paper, sizes, ONE, length, 64, 32) == pytest.approx(2 * bound)
    assert plan.writing(paper, sizes, ONE, length, 33, 32) == pytest.approx(2 * bound)
    keys = length.response * (length.image + length.prompt + length.response / 2) * 2 * 28 * 8 * 128 * 2
    read = 9216 * sizes.weights + 512 * keys
    seconds = read / (2039e9 * plan.STREAMED)
    assert seconds > 3600 * bound
    assert plan.writing(paper, sizes, ONE, length, 512, 512) == pytest.approx(seconds / 3600)


def test_twice_the_rollouts_take_twice_the_time_and_eight_cards_an_eighth_of_training_alone(paper, sizes):
    more = paper.model_copy(update={"rl_prompts": 2 * paper.rl_prompts})
    one, two, shared = (plan.hours(p, sizes, card) for p, card in ((paper, ONE), (more, ONE), (paper, EIGHT)))
    assert two["an RL arm"] == pytest.approx(2 * one["an RL arm"])
    assert two["measuring"] == one["measuring"] == shared["measuring"]
    assert shared["an SFT arm"] == pytest.approx(one["an SFT arm"] / 8)
    # Four batches of 32 on one card are one of 16 on each of eight: a quarter of the time, not an eighth
    written = [plan.rollout_hours(paper, sizes, card)[0] for card in (ONE, EIGHT)]
    assert written[1] == pytest.approx(written[0] / 4)
    assert one["paid"] == one["the study"]
    assert shared["paid"] == pytest.approx(8 * (shared["the study"] - shared["measuring"]) + shared["measuring"])


def test_the_study_is_the_sum_of_its_arms(paper, sizes):
    spent = plan.hours(paper, sizes, ONE)  # 8 SFT arms; outcome, 3 + 1 mixed, 1 surrogate, 1 routed; RL's start
    arms = 8 * spent["an SFT arm"] + 7 * spent["an RL arm"] + sum(range(1, 11)) / 10 * spent["an SFT arm"]
    assert spent["the study"] == pytest.approx(arms + spent["measuring"])
    told = plan.hours(paper.model_copy(update={"rl_start_steps": paper.sft_steps}), sizes, ONE)
    trained = spent["the study"] - spent["measuring"] - (told["the study"] - told["measuring"])
    assert trained == pytest.approx(4.5 * spent["an SFT arm"])
    asks = paper.model_copy(update={"surrogates": ["self_blindfold"]})
    answers = plan.hours(asks, sizes, ONE)["the study"] - spent["the study"]
    assert answers == pytest.approx(plan.rollout_hours(paper, sizes, ONE)[1])


def test_vllm_takes_memory_to_save_time(paper, sizes):
    quick = paper.model_copy(update={"vllm": True})
    assert plan.rollout_hours(quick, sizes, ONE)[0] < plan.rollout_hours(paper, sizes, ONE)[0] / 2
    assert plan.work(quick, sizes)["an RL arm"] > plan.work(paper, sizes)["an RL arm"]  # scored once more


def test_a_card_that_is_too_small_says_so(paper):
    table = plan.plan(paper).set_index("quantity")
    assert table.how[f"memory: most at once, {plan.SMALL}"].startswith("does not fit")
    assert table.how[f"memory: most at once, {plan.LARGE}"] == "fits"
    small = table.value[[name for name in table.index if name.endswith(plan.SMALL) and name[:4] in ("time", "cost")]]
    assert len(small) == 5
    assert small.isna().all()
    assert table.value[f"cost: {plan.LARGE}"] == pytest.approx(2 * table.value[f"time: the study, {plan.LARGE}"])


def test_the_table_is_that_of_the_files_and_its_small_card_that_of_the_readme():
    table = plan.summary([Params.load(path) for path in FILES])
    pd.testing.assert_frame_equal(table, pd.read_csv(repo_root() / "results" / "plan" / "plan.csv"), check_dtype=False)
    assert len(table) == 12
    assert not (table[[plan.LARGE, "8 x 80 GB (A100)"]] == "does not fit").any(axis=None)
    (small,) = [name for name in table if name.startswith(plan.SMALL)]
    assert ((table[small] != "does not fit") == table.study.str.contains("_2b_")).all()
    readme = (repo_root() / "params" / "README.md").read_text(encoding="utf-8")
    assert all(f"{key}={value}" in readme for key, value in plan.SPARING.items())


def test_a_model_that_is_nowhere_is_refused(monkeypatch):
    def unreachable(name, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ParamsError, match=r"model = 'x/y': .* \(no route to the hub\).*hf download x/y"):
        plan.config_of(Params(model="x/y"))
