"""The closed forms of the segment-weighted trainer. Gradients are read just before the optimizer, without clipping."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import concatenate_datasets
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from asym import models, sft
from asym.balance import Fixed, NGDiff, PCGrad, PerceptionFirst, Segments, TokenAveraged, Uncertainty, balance_of
from asym.base import train_base
from asym.data import build_split
from asym.params import Params
from asym.sft import METRICS, SegmentCollator, SegmentSFTTrainer, train_arm
from asym.training import ProgressCallback
from asym.transcript import PERCEPTION, REASONING

POLICIES = {"token_averaged": TokenAveraged(), "lambda_0.3": Fixed(0.3), "ngdiff": NGDiff()}
POLICIES |= {"uncertainty": Uncertainty(), "pcgrad": PCGrad()}
policies = pytest.mark.parametrize("balance", POLICIES.values(), ids=POLICIES)
EXACT = {"atol": 1e-6, "rtol": 1e-4}


@pytest.fixture(scope="module")
def rows(tiny):
    """Eight rows of both tasks, so that prompts, perceptions and responses differ in length."""
    return concatenate_datasets([build_split(tiny(n_train_sft=4), name, "train_sft", 0) for name in Params().tasks])


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Batches of eight go through the model in several parts, so that what is tested holds for parts."""
    monkeypatch.setattr(models, "TOGETHER", 700)


class Watch(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        grads = {name: q.grad for name, q in model.named_parameters()}
        self.grads.append({name: torch.zeros(()) if grad is None else grad.clone() for name, grad in grads.items()})


def train(folder, model, processor, rows, balance=None, *, batch=8, accumulation=1, steps=1, log_every=10, **changes):
    """Train; return the gradients of every step and the trainer. Without a balance it is TRL's own trainer."""
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.1,
        optim="sgd",  # Adam would blow rounding of gradients near zero up to whole steps
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=log_every,
        max_grad_norm=0.0,
        **{"save_strategy": "no", "bf16": False, "activation_checkpointing": False, "max_length": None, "seed": 0},
        **{"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False},
        **{"dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True},
        **changes,
    )
    collate, watch = SegmentCollator(processor), Watch()
    stock = lambda rows: {name: value for name, value in collate(rows).items() if name != "segments"}  # noqa: E731
    common = {"model": model, "args": arguments, "train_dataset": rows, "processing_class": processor}
    if balance is None:
        trainer = SFTTrainer(**common, data_collator=stock, callbacks=[watch])
    else:
        trainer = SegmentSFTTrainer(**common, data_collator=collate, callbacks=[watch], balance=balance)
    trainer.train()
    return watch.grads, trainer


def weights(model):
    return {name: q.detach().clone() for name, q in model.named_parameters()}


def assert_same(one: dict, other: dict, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], **(tolerance or EXACT), msg=lambda text, n=name: f"{n}: {text}"
        )


def definition(model, processor, rows):
    """L_p and L_r as means over their own tokens, from logits, and their gradients from two full backwards."""
    batch = SegmentCollator(processor)(list(rows))
    segments, labels = batch.pop("segments")[:, 1:], batch.pop("labels")[:, 1:]
    losses = F.cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), labels, reduction="none")  # (B, T - 1)
    means = [losses[segments == segment].mean() for segment in (PERCEPTION, REASONING)]
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(mean, parameters, retain_graph=True, allow_unused=True) for mean in means]
    grads = [{name: torch.zeros(()) if g is None else g for name, g in zip(names, grad, strict=True)} for grad in grads]
    return [mean.item() for mean in means], grads


def norm(grads: dict) -> float:
    return torch.stack([grad.norm() for grad in grads.values()]).norm().item()


def mix(weight: float, grads_p: dict, grads_r: dict) -> dict:
    return {name: weight * grads_p[name] + (1 - weight) * grads_r[name] for name in grads_p}


def logged(trainer) -> dict:
    return next(entry for entry in trainer.state.log_history if "loss_reasoning" in entry)


# The batch


def test_segments_and_labels_cover_the_response_and_nothing_else(vlm, rows):
    processor = vlm[1]
    batch = SegmentCollator(processor)(list(rows))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["segments"].shape
    for row, ids, labels, segments, mask in zip(
        rows, *(batch[name] for name in ("input_ids", "labels", "segments", "attention_mask")), strict=True
    ):
        decode = processor.tokenizer.decode
        assert decode(ids[labels != -100]) == row["response"] + "<|im_end|>"
        assert decode(ids[segments == PERCEPTION]) == f"<perception>{row['perception']}</perception>"
        assert ((segments == 0) == (labels == -100)).all()
        assert (labels[labels != -100] == ids[labels != -100]).all()
        assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
        assert mask.sum() == (ids != processor.tokenizer.pad_token_id).sum()
        assert decode(ids[mask == 1][segments[mask == 1] == 0]).endswith("<|im_start|> assistant\n")


def test_a_batch_is_what_the_processor_makes_of_the_whole_texts(vlm, rows):
    processor = vlm[1]
    batch = SegmentCollator(processor)(list(rows))
    prompts = [models.chat(processor, row["query"], image=True) for row in rows]
    texts = [prompt + row["response"] + "<|im_end|>" for prompt, row in zip(prompts, rows, strict=True)]
    whole = processor(text=texts, images=list(rows["image"]), padding=True, padding_side="right", return_tensors="pt")
    assert set(whole) <= set(batch)
    assert all(torch.equal(whole[name], batch[name]) for name in whole)


def test_rows_without_image_or_perception_are_all_reasoning(vlm, rows):
    text = {"query": "Why?", "response": "Because."}
    batch = SegmentCollator(vlm[1])([text, rows[0]])
    assert set(batch["segments"][0].tolist()) == {0, REASONING}
    assert len(batch.get("image_grid_thw", batch["pixel_values"])) == 1
    assert "pixel_values" not in SegmentCollator(vlm[1])([text, text])


def test_parts_of_a_batch_are_its_rows_cut_and_give_what_the_whole_gives(vlm, rows):
    """Rows with and without image mixed; some parts have no image at all."""
    model, processor = vlm
    texts = [{"query": "Why?", "response": "Because " * k} for k in (1, 200, 201, 202)]
    batch = SegmentCollator(processor)([rows[0], *texts, *rows.select([1, 5])])
    batch.pop("segments")
    with torch.no_grad():
        whole = model(**batch).logits.log_softmax(-1)
        parts = list(sft._by_length(batch))
        assert sorted(torch.cat([rows for _, rows, _ in parts]).tolist()) == list(range(7))
        assert all(len(rows) == 1 or len(rows) * width <= models.TOGETHER for _, rows, width in parts)
        assert {"pixel_values" in part for part, *_ in parts} == {False, True}
        for part, chosen, width in parts:
            assert part["input_ids"].shape[1] == width == batch["attention_mask"][chosen].sum(1).max()
            found, expected = model(**part).logits.log_softmax(-1), whole[chosen, :width]
            real = batch["attention_mask"][chosen, :width].bool()
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)


def test_a_model_unknown_to_decode_trains_on_whole_batches(vlm, rows, tmp_path, monkeypatch):
    model, processor = vlm
    known, _ = train(tmp_path / "known", model, processor, rows, NGDiff())
    monkeypatch.setattr("asym.decode.KNOWN", ())
    monkeypatch.setattr(sft, "_by_length", None)
    again, _ = models.load(Path(model.name_or_path))
    unknown, _ = train(tmp_path / "unknown", again, processor, rows, NGDiff())
    assert_same(known[0], unknown[0])


# The loss and its gradients


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4), (4, 1)])
def test_token_averaged_is_the_stock_trainer(vlm, rows, tmp_path, batch, accumulation):
    """Loss, gradients and weights of two steps; the first is probed with the prefix pass, the second is not."""
    model, processor = vlm
    other, _ = models.load(Path(model.name_or_path))
    other.accepts_loss_kwargs = True  # else, for these models, it takes means of micro-batch means when accumulating
    settings = {"batch": batch, "accumulation": accumulation, "steps": 2}
    stock, stock_trainer = train(tmp_path / "stock", other, processor, rows, **settings)
    ours, trainer = train(tmp_path / "ours", model, processor, rows, TokenAveraged(), **settings)
    assert len(ours) == len(stock) == 2
    for one, two in zip(ours, stock, strict=True):
        assert norm(two) > 0.1
        assert_same(one, two)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        stock_trainer.state.log_history[-1]["train_loss"], rel=1e-5
    )
    assert_same(weights(model), weights(other))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_fixed_lambda_is_the_mean_losses_mixed(vlm, rows, tmp_path, weight):
    model, processor = vlm
    (loss_p, loss_r), grads = definition(model, processor, rows)
    (ours,), trainer = train(tmp_path, model, processor, rows, Fixed(weight))
    assert_same(ours, mix(weight, *grads))
    log = logged(trainer)
    assert log["loss_perception"] == pytest.approx(loss_p, rel=1e-5)
    assert log["loss_reasoning"] == pytest.approx(loss_r, rel=1e-5)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        weight * loss_p + (1 - weight) * loss_r, rel=0.3
    )


def test_ngdiff_steps_along_the_sum_of_the_unit_gradients(vlm, rows, tmp_path):
    model, processor = vlm
    _, (grads_p, grads_r) = definition(model, processor, rows)
    (ours,), trainer = train(tmp_path, model, processor, rows, NGDiff())
    norm_p, norm_r = norm(grads_p), norm(grads_r)
    assert_same(ours, mix(norm_r / (norm_p + norm_r), grads_p, grads_r))
    direction = {name: grads_p[name] / norm_p + grads_r[name] / norm_r for name in ours}
    assert_same({n: g / norm(ours) for n, g in ours.items()}, {n: g / norm(direction) for n, g in direction.items()})
    log = logged(trainer)
    assert log["lambda"] == pytest.approx(norm_r / (norm_p + norm_r), rel=1e-4)
    assert log["grad_norm_perception"] == pytest.approx(norm_p, rel=1e-4)
    assert log["grad_norm_reasoning"] == pytest.approx(norm_r, rel=1e-4)
    cosine = sum((grads_p[name] * grads_r[name]).sum() for name in grads_p) / (norm_p * norm_r)
    assert log["grad_cosine"] == pytest.approx(cosine.item(), rel=1e-3)
    assert abs(norm_p - norm_r) > 0.05 * norm_r  # else λ = ½ would pass as well


def test_the_prefix_pass_gives_exactly_the_perception_gradient(vlm, rows, tmp_path):
    model, processor = vlm
    _, trainer = train(tmp_path, model, processor, rows, NGDiff())  # also gives the model its fused head
    model.zero_grad()
    _, (grads_p, _) = definition(model, processor, rows)
    batch = SegmentCollator(processor)(list(rows))
    segments = batch.pop("segments")
    n_p = (segments == PERCEPTION).sum()
    cut, cut_segments = SegmentSFTTrainer._prefix(batch, segments)
    assert cut["input_ids"].shape == cut["labels"].shape == cut_segments.shape
    assert (cut_segments == PERCEPTION).sum() == n_p
    assert cut_segments.shape[1] < segments.shape[1] / 2
    assert (cut_segments[:, -1] == PERCEPTION).any()
    assert cut["pixel_values"] is batch["pixel_values"]
    sum_p, _ = trainer._segment_sums(model, cut, cut_segments)
    (sum_p / n_p).backward()
    grads = {name: torch.zeros(()) if q.grad is None else q.grad for name, q in model.named_parameters()}
    assert_same(grads, grads_p)


@policies
def test_a_batch_of_8_is_8_accumulated_batches_of_1(base, rows, tmp_path, balance):
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model, processor = models.load(base.checkpoint)
        grads, trainer = train(
            tmp_path / str(batch), model, processor, rows, balance, batch=batch, accumulation=accumulation
        )
        results.append((grads[0], weights(model), {name: logged(trainer)[name] for name in METRICS}))
    (grads, after, log), (grads_8, after_8, log_8) = results
    assert_same(grads, grads_8)
    assert_same(after, after_8)
    assert log == pytest.approx(log_8, rel=1e-4)


def test_a_micro_batch_without_perception_adds_none(base, rows, tmp_path):
    mixed = rows.map(lambda row, k: {"response": "Because."} if k % 2 else row, with_indices=True)
    results = []
    for batch, accumulation in ((8, 1), (1, 8)):
        model, processor = models.load(base.checkpoint)
        folder = tmp_path / str(batch)
        grads, _ = train(folder, model, processor, mixed, NGDiff(), batch=batch, accumulation=accumulation)
        results.append(grads[0])
    assert_same(*results)


@pytest.mark.parametrize("balance", [TokenAveraged(), Fixed(0.3)], ids=["token_averaged", "lambda_0.3"])
def test_probing_the_gradients_does_not_change_the_step(base, rows, tmp_path, balance):
    results = []
    for log_every in (1, 100):  # every step probed; only the first
        model, processor = models.load(base.checkpoint)
        grads, trainer = train(
            tmp_path / str(log_every),
            model,
            processor,
            rows,
            balance,
            batch=2,
            accumulation=2,
            steps=4,
            log_every=log_every,
        )
        results.append((grads, weights(model), trainer))
    assert_same(results[0][1], results[1][1])
    assert_same(results[0][0][1], results[1][0][1])
    probed = [entry for entry in results[0][2].state.log_history if "grad_cosine" in entry]
    assert len(probed) == 4


@pytest.mark.parametrize("missing", ["perception", "reasoning"])
def test_a_batch_with_one_segment_alone_trains_on_it(vlm, rows, tmp_path, missing):
    model, processor = vlm
    if missing == "perception":
        rows = rows.map(lambda row: {"response": "Because."})
    else:
        collate = SegmentCollator.__call__
        only = lambda self, rows: (b := collate(self, rows)) | {"segments": b["segments"].clamp(max=1)}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SegmentCollator, "__call__", only)
            (grads,), _ = train(tmp_path, model, processor, rows, NGDiff())
            assert norm(grads) > 0
            return
    (grads,), trainer = train(tmp_path, model, processor, rows, TokenAveraged())
    assert norm(grads) > 0
    assert logged(trainer)["token_share"] == 0


# λ


def test_the_policies_are_their_formulas():
    step = Segments(n_p=1, n_r=9, norm_p=3.0, norm_r=1.0)
    assert TokenAveraged().weight(step) == 0.1
    assert Fixed(0.7).weight(step) == 0.7
    assert NGDiff().weight(step) == 0.25
    assert NGDiff().weight(Segments(1, 9, norm_p=0.0, norm_r=0.0)) == 0.5
    assert [policy.needs_gradients for policy in POLICIES.values()] == [False, False, True, True, True]


def test_uncertainty_steps_along_the_gradient_of_the_sum_of_the_log_losses(vlm, rows, tmp_path):
    model, processor = vlm
    (loss_p, loss_r), (grads_p, grads_r) = definition(model, processor, rows)
    (ours,), trainer = train(tmp_path, model, processor, rows, Uncertainty(), batch=4, accumulation=2)
    assert logged(trainer)["lambda"] == pytest.approx(loss_r / (loss_p + loss_r), rel=1e-4)
    of_logs = {name: grads_p[name] / loss_p + grads_r[name] / loss_r for name in ours}
    assert_same({n: g / norm(ours) for n, g in ours.items()}, {n: g / norm(of_logs) for n, g in of_logs.items()})
    assert Uncertainty().weight(Segments(1, 9, loss_p=0.0, loss_r=0.0)) == 0.5


def test_pcgrad_adds_the_gradients_projected_off_each_other_only_where_they_conflict():
    grad_p, grad_r = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    step = Segments(1, 9, norm_p=1.0, norm_r=5**0.5, cosine=-(5**-0.5))
    weight = PCGrad().weight(step)
    surgery = (grad_p - grad_p @ grad_r / (grad_r @ grad_r) * grad_r) + (grad_r - (grad_r @ grad_p) * grad_p)
    mixed = weight * grad_p + (1 - weight) * grad_r
    torch.testing.assert_close(mixed / mixed.norm(), surgery / surgery.norm())
    assert weight != 0.5
    assert PCGrad().weight(Segments(1, 9, norm_p=1.0, norm_r=7.0, cosine=0.3)) == 0.5
    assert PCGrad().weight(Segments(1, 9, norm_p=0.0, norm_r=0.0, cosine=0.0)) == 0.5


def test_perception_first_turns_to_all_tokens_half_way(base, rows, tmp_path):
    steps = [Segments(1, 9, progress=share) for share in (0.0, 0.49, 0.5, 1.0)]
    assert [PerceptionFirst().weight(step) for step in steps] == [1.0, 1.0, 0.1, 0.1]
    model, processor = models.load(base.checkpoint)
    _, trainer = train(tmp_path, model, processor, rows, PerceptionFirst(), steps=4, log_every=1)
    found = [entry["lambda"] for entry in trainer.state.log_history if "lambda" in entry]
    assert found[:2] == [1.0, 1.0]
    assert found[2] == found[3] == pytest.approx(logged(trainer)["token_share"])


def test_perception_first_learns_from_as_many_tokens_as_every_other_arm():
    """Half of 200 steps on a twentieth of the tokens cost 5 whole steps: 195 are left."""
    balance, steps = PerceptionFirst.at_equal_tokens(200, 0.05)
    weights = [balance.weight(Segments(5, 95, progress=step / steps)) for step in range(steps)]
    assert (weights.count(1.0), weights.count(0.05)) == (100, 195)
    assert sum(5 if weight == 1.0 else 100 for weight in weights) == 200 * 100
    assert PerceptionFirst.at_equal_tokens(1, 0.05)[1] == 1


def test_the_stages_of_perception_first_warm_up_and_decay_by_their_length(base, rows, tmp_path):
    model, processor = models.load(base.checkpoint)
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 3}
    _, trainer = train(tmp_path, model, processor, rows, PerceptionFirst(1 / 3), steps=9, log_every=1, **settings)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 0.1, 0.05, *(0, 0.05, 0.1, 0.075, 0.05, 0.025)])


def test_perception_first_warms_up_and_decays_twice(base, rows, tmp_path):
    model, processor = models.load(base.checkpoint)
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 4}
    _, trainer = train(tmp_path, model, processor, rows, PerceptionFirst(), steps=12, log_every=1, **settings)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    half = [0.0, 0.05, 0.1, 0.075, 0.05, 0.025]
    assert rates == pytest.approx([*half, *half])


def test_arms_name_their_policies():
    assert isinstance(balance_of("token_averaged"), TokenAveraged)
    assert isinstance(balance_of("ngdiff"), NGDiff)
    assert balance_of("lambda_0.5") == Fixed(0.5)
    p = Params().model_copy(update={"lambdas": [0.3, 0.5], "balances": ["pcgrad", "perception_first"]})
    arms = ["token_averaged", "lambda_0.3", "lambda_0.5", "ngdiff", "pcgrad", "perception_first"]
    assert sft.arms(p) == arms
    assert [type(balance_of(arm)) for arm in arms[-2:]] == [PCGrad, PerceptionFirst]


@pytest.mark.parametrize("arm", ["lambda_1.5", "lambda_-0.1", "lambda_nan", "lambda_x", "lambda", "stock", ""])
def test_an_unknown_arm_is_refused(arm):
    with pytest.raises(ValueError, match="unknown SFT arm"):
        balance_of(arm)


# Runs


def interrupt(monkeypatch, at: int):
    """Stop training in the middle of a step that has not been saved."""
    step_end = ProgressCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressCallback, "on_step_end", on_step_end)


@pytest.mark.parametrize(
    ("family", "arm", "lora_rank"),
    [
        ("qwen3_vl", "token_averaged", 0),
        ("qwen3_vl", "ngdiff", 0),
        ("internvl", "ngdiff", 0),
        ("internvl", "ngdiff", 2),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_weights_and_metrics(
    tiny, bases, root, monkeypatch, family, arm, lora_rank
):
    p, base = tiny(sft_steps=6, sft_batch=2, sft_accumulation=2, family=family, lora_rank=lora_rank), bases(family)
    monkeypatch.setattr(sft, "SAVE_EVERY", 2)
    monkeypatch.setattr(sft, "LOG_EVERY", 2)
    monkeypatch.setattr("asym.sft.repo_root", lambda: root / "whole")
    whole = train_arm(p, base, "sudoku", arm, 0)
    monkeypatch.setattr("asym.sft.repo_root", lambda: root / "cut")
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            train_arm(p, base, "sudoku", arm, 0)
    (half,) = (root / "cut" / "runs").glob("sft-*")
    assert not (half / "DONE").exists()
    assert [path.name for path in half.glob("trainer/checkpoint-*")] == ["checkpoint-2"]
    resumed = train_arm(p, base, "sudoku", arm, 0)
    assert resumed.folder == half
    assert resumed.done
    weights = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    one, other = (load_file(run.checkpoint / weights) for run in (whole, resumed))
    assert_same(one, other, atol=0, rtol=0)
    pd.testing.assert_frame_equal(whole.metrics(), resumed.metrics())
    assert list(whole.metrics()["step"]) == [2, 4, 6]


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_an_interrupted_base_resumes_to_the_same_weights(tiny, root, monkeypatch, family):
    p = tiny(language_steps=4, vision_steps=2, family=family)
    monkeypatch.setattr(sft, "SAVE_EVERY", 2)
    monkeypatch.setattr("asym.base.repo_root", lambda: root / "whole")
    whole = train_base(p)
    monkeypatch.setattr("asym.base.repo_root", lambda: root / "cut")
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            train_base(p)
    (half,) = (root / "cut" / "runs").glob("base-language-*")
    assert [path.name for path in half.glob("trainer/checkpoint-*")] == ["checkpoint-2"]
    resumed = train_base(p)
    one, other = (load_file(run.checkpoint / "model.safetensors") for run in (whole, resumed))
    assert_same(one, other, atol=0, rtol=0)


def test_a_finished_arm_is_reused_and_what_determines_it_names_its_folder(tiny, base, root, monkeypatch):
    run = train_arm(tiny(), base, "sudoku", "lambda_0.5", 0)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("DONE", "checkpoint", "config.json", "manifest.json", "metrics.csv")
    ]
    config = json.loads((run.folder / "config.json").read_text())
    assert config["base"] == base.folder.name
    metrics = run.metrics(arm="lambda_0.5")
    assert list(metrics) == ["arm", "step", *METRICS]
    assert (metrics["lambda"] == 0.5).all()
    assert metrics.notna().all(axis=None)
    monkeypatch.setattr(sft, "fit", None)
    assert train_arm(tiny(), base, "sudoku", "lambda_0.5", 0).folder == run.folder
    for p, task, arm, seed in (
        (tiny(), "graph_coloring", "lambda_0.5", 0),
        (tiny(), "sudoku", "lambda_0.7", 0),
        (tiny(), "sudoku", "lambda_0.5", 1),
        (tiny(sft_lr=2e-3), "sudoku", "lambda_0.5", 0),
        (tiny(sft_steps=3), "sudoku", "lambda_0.5", 0),
    ):
        with pytest.raises(TypeError):  # would train
            train_arm(p, base, task, arm, seed)


def test_what_a_released_model_reads_and_how_names_its_folder_too(tiny, base, root):
    """The base of such a study is a folder, which does not tell the data apart as the small base's parameters do."""
    changes = {"data": "elsewhere", "image_size": 64, "blanks_max": 7, "dtype": "bfloat16", "attention": "eager"}
    studies = [tiny(), *(tiny(**{key: value}) for key, value in changes.items())]
    studies += [tiny(data="elsewhere", n_validation=3)]  # rows that SFT gives up
    folders = {sft.along(p, base, "sudoku", "ngdiff", 0)[p.sft_steps].folder for p in studies}
    assert len(folders) == len(studies)


def test_checkpoints_along_a_training_are_those_it_passed(tiny, base, root, monkeypatch):
    """Also when they are asked for only after the arm has been trained."""
    bare = train_arm(tiny(sft_steps=5, curve_every=0), base, "sudoku", "ngdiff", 0)
    p = tiny(sft_steps=5, curve_every=2)
    end = train_arm(p, base, "sudoku", "ngdiff", 0)
    runs = sft.along(p, base, "sudoku", "ngdiff", 0)
    assert list(runs) == [2, 4, 5]
    assert end.folder == bare.folder == runs[5].folder
    assert all(run.done for run in runs.values())
    found = [load_file(run.checkpoint / "model.safetensors") for run in runs.values()]
    before = load_file(base.checkpoint / "model.safetensors")
    moved = [sum((after[name] - before[name]).norm().item() ** 2 for name in before) for after in found]
    assert 0 < moved[0] < moved[1] < moved[2]
    monkeypatch.setattr(sft, "fit", None)
    assert train_arm(p, base, "sudoku", "ngdiff", 0).folder == end.folder


def test_checkpoints_asked_for_while_resuming_are_all_made(tiny, base, root, monkeypatch):
    monkeypatch.setattr(sft, "SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            train_arm(tiny(sft_steps=4, curve_every=0), base, "sudoku", "token_averaged", 0)
    p = tiny(sft_steps=4, curve_every=1)
    run = train_arm(p, base, "sudoku", "token_averaged", 0)
    runs = sft.along(p, base, "sudoku", "token_averaged", 0)
    assert list(runs) == [1, 2, 3, 4]
    assert all(each.done and (each.checkpoint / "model.safetensors").exists() for each in runs.values())
    assert runs[4].folder == run.folder


@pytest.mark.parametrize("parts", [["language"], ["projector", "vision"]])
def test_an_arm_leaves_the_parts_it_does_not_train_as_they_were(tiny, base, root, parts):
    run = train_arm(tiny(trained_parts=parts, sft_steps=3), base, "sudoku", "ngdiff", 0)
    before, after = (load_file(each.checkpoint / "model.safetensors") for each in (base, run))
    moved = {models.part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(parts)


def test_a_lora_arm_trains_its_adapter_alone_and_reloads_merged(tiny, base, root):
    run = train_arm(tiny(lora_rank=2, sft_lr=0.05), base, "sudoku", "ngdiff", 0)
    saved = {path.name for path in run.checkpoint.iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    before, after = weights(models.load(base.checkpoint)[0]), weights(models.load(run.checkpoint)[0])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {
        name.split("base_model.model.")[1].split(".lora_")[0]
        for name in load_file(run.checkpoint / "adapter_model.safetensors")
    }
    assert changed == {f"{name}.weight" for name in adapted}
    assert "model.language_model.embed_tokens.weight" not in changed


def test_the_base_is_one_model_for_both_tasks(base):
    assert base.done
    assert base.config["tasks"] == ["sudoku", "graph_coloring"]
    assert {path.name.rsplit("-", 1)[0] for path in Path(base.folder).parent.glob("[!.]*")} == {"base", "base-language"}
    assert len(base.metrics()) == 1
    assert 0 < base.metrics()["token_share"].item() < 1  # it transcribes, and goes on reading puzzles as text


def test_a_stage_of_no_steps_leaves_the_weights_as_they_were(tiny, root):
    base = train_base(tiny(language_steps=0, vision_steps=0))
    (language,) = root.glob("runs/base-language-*/checkpoint/model.safetensors")
    one, other = load_file(language), load_file(base.checkpoint / "model.safetensors")
    assert_same(one, other, atol=0, rtol=0)
    assert len(base.metrics()) == 0
