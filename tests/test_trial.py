"""A few steps on the machine at hand: each part is measured as a study would run it, beside its part of the plan."""

import gc
import weakref

import pandas as pd
import pytest
import torch
from PIL import Image

from asym import models, plan
from asym import trial as trials
from asym.__main__ import main
from asym.params import Params, ParamsError
from asym.runs import repo_root
from asym.trial import COLUMNS, build, trial

PARTS = {"writing": "keys and values, evaluation", "SFT, ngdiff": "activations, SFT", "RL, update": "activations, RL"}


@pytest.fixture
def p(tiny):
    return tiny(
        n_train_sft=1, lora_rank=2, rl_prompts=3, rl_group=2, rl_accumulation=2, eval_batch=5, max_new_tokens=40
    )


def test_every_part_is_measured_and_memory_beside_its_part_of_the_plan(p):
    table = trial(p)
    assert list(table) == COLUMNS
    found = table.set_index("quantity")
    memory = found[found.index.str.startswith("memory")]
    assert (found.measured.drop(memory.index) > 0).all()
    assert memory.measured.isna().all() != torch.cuda.is_available()
    sizes = plan.Sizes(p)
    for length in (sizes.length, sizes.rl_length):
        length["response"] = p.max_new_tokens
    parts = plan.memory(p, sizes, plan.CARDS[plan.LARGE])
    for part, activations in PARTS.items():
        trained = () if part == "writing" else ("gradients", "optimizer")
        held = sum(parts[name][0] for name in ("weights", activations, *trained)) / plan.GB
        assert memory.planned[f"memory: {part}"] == pytest.approx(held, rel=0.01)


def test_the_share_of_the_peak_is_work_by_hand_over_time(p):
    one = p.model_copy(update={"sft_steps": 1, "sft_accumulation": 1, "lora_rank": 0})
    found, sizes = trial(one).set_index("quantity").measured, plan.Sizes(one)
    context = sizes.length[["image", "prompt"]].sum() + one.max_new_tokens
    # Forward 2, back 4; two layers attend over queries of width 32 to half of the context, for keys and for values
    flops = 6 * context * (sizes.n.language + 2 * 32 * context) + 2 * sizes.n.vision * sizes.length.patches
    for part in ("SFT, ngdiff", "RL, update"):
        seconds, peak = found[f"{part}: a response"], found["peak of products"] * 1e12
        assert found[f"{part}: share of the peak"] == pytest.approx(flops / seconds / peak, rel=0.02)
    assert "writing: under adapters" not in found.index


def test_responses_are_as_long_as_the_study_allows(p):
    tried = trials._Trial(p)
    count = lambda text: len(tried.processor.tokenizer(text)["input_ids"])  # noqa: E731
    response = tried.rows("train_sft", 1)[0]["response"]
    assert abs(count(tried.lengthened(response, 3 * count(response))) - 3 * count(response)) <= 1
    assert tried.at_once == 4  # of an eval_batch of 5, whole groups of 2


def test_a_part_that_does_not_fit_is_named_and_leaves_nothing_behind(p, monkeypatch):
    before, alive = [], []
    stock = trials.build

    def watched(p):
        gc.collect()
        alive.append([reference() is not None for reference in before])
        model, processor = stock(p)
        before.append(weakref.ref(model))
        return model, processor

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trials, "build", watched)
    monkeypatch.setattr(trials, "decode", full)
    found = trial(p).set_index("quantity").measured
    assert {"first tokens: does not fit", "last tokens: does not fit", "under adapters: does not fit"} <= set(
        found.index
    )
    assert found["SFT, ngdiff: a response"] > 0
    assert alive == [[], [False], [False, False], [False, False, False]]


def test_what_a_trial_cannot_do_is_refused(tiny, monkeypatch):
    with pytest.raises(ParamsError, match="attention = 'sdpa'"):
        trial(tiny(attention="eager"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ParamsError, match="2 GPUs are visible"):
        trial(tiny())


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in plan.RELEASED if "2B" in name])
def test_a_model_in_the_sizes_of_a_release_takes_the_image_tokens_of_the_small_processor(name, monkeypatch):
    small = plan.config_of(Params(model=name))
    small.text_config.update({"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    small.text_config.update({"hidden_size": 64, "intermediate_size": 64, "vocab_size": 2048})
    if small.model_type == "qwen3_vl":
        small.vision_config.update({"out_hidden_size": 64, "depth": 2, "deepstack_visual_indexes": [0]})
    else:
        small.vision_config.update({"num_hidden_layers": 2})
    monkeypatch.setattr(plan, "config_of", lambda p: small)
    p = Params(model=name, family=small.model_type, image_size=448)
    model, processor = build(p)
    text, image = models.chat(processor, "", True), Image.new("RGB", (448, 448))
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == plan.lengths(small, p, 1).image
    assert model(**inputs).logits.shape[-1] == 2048


def test_the_command_prints_a_table_for_each_study_and_writes_them_together(tmp_path, monkeypatch, capsys):
    def found(p):
        return pd.DataFrame([[p.study, "cpu", "bandwidth of memory", float("nan"), 1.5, "GB/s"]], columns=COLUMNS)

    monkeypatch.setattr(trials, "trial", found)
    monkeypatch.setattr("asym.runs.repo_root", lambda: tmp_path)
    files = [str(repo_root() / "params" / f"{name}.yaml") for name in ("smoke", "cpu")]
    assert main(["plan", "--measure", "--write", *files]) == 0
    written = pd.read_csv(tmp_path / "results" / "plan" / "measured.csv")
    assert written.study.tolist() == ["smoke", "cpu"]
    assert capsys.readouterr().out.count("bandwidth of memory") == 2
