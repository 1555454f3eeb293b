import itertools
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from asym import decode as decoding
from asym import models, rl, training
from asym.credit import perception_mask
from asym.data import load_split, task_of
from asym.decode import decode
from asym.params import Params, ParamsError
from asym.rl import REWARDS, train_arm
from asym.runs import Run, repo_root
from asym.start import train_start
from asym.training import TRAINING, ProgressCallback, share

COLUMNS = ["step", "problem_id", "rollout", "ground_truth", "completion"]
NAMES = [reward.__name__ for reward in REWARDS]


@pytest.fixture
def start(base):
    """RL from the tiny base: what it starts from is the same to the code."""
    return Run(base.folder, base.config)


@pytest.fixture
def script(monkeypatch, base):
    """Rollouts written by hand in place of sampled ones, the same for every prompt of a step, so rewards vary."""

    def script(responses: list[str]):
        processor = models.load(base.checkpoint)[1]
        tokenizer = processor.tokenizer
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in responses]

        def decode(model, inputs, copies, **_):
            return ids * (len(inputs["input_ids"]) * copies // len(ids))

        monkeypatch.setattr(rl, "decode", decode)

    return script


def mixed_responses(p: Params, task: str) -> list[str]:
    """For either of two problems: one right response, one to the other problem, right eyes or not with a wrong answer,
    and one that cannot be read."""
    first, second = load_split(p, task, "train_rl", 0)["response"]
    answer = second[second.index("<reasoning>") :]
    return [first, second, first[: first.index("<reasoning>")] + answer, first.replace("</answer>", "")]


def recomputed(p: Params, task_name: str, rollouts: pd.DataFrame) -> pd.DataFrame:
    """Every reward of every step, from the stored ground truths and texts alone."""
    task, steps = task_of(p, task_name), []
    for _, step in rollouts.groupby("step"):
        problems = [task.problem(json.loads(truth)) for truth in step.ground_truth]
        values = {reward.__name__: reward(task, problems, step.completion.tolist()) for reward in REWARDS}
        steps.append(pd.DataFrame(values, index=step.index))
    return pd.concat(steps)


@pytest.mark.parametrize(("task", "arm"), [("sudoku", "alpha_0.3"), ("graph_coloring", "solver_blindfold")])
def test_rollouts_keep_their_groups_texts_and_every_reward(tiny, start, root, script, task, arm):
    p = tiny(rl_steps=2, max_new_tokens=400, rl_lr=1e-2)
    responses = mixed_responses(p, task)
    script(responses)
    run = train_arm(p, start, task, arm, 0)
    rollouts = pd.read_parquet(run.folder / "rollouts.parquet")
    assert list(rollouts) == [*COLUMNS, *NAMES, "advantage_perception", "advantage"]
    assert len(rollouts) == 2 * 2 * 4
    groups = list(rollouts.groupby(["step", "problem_id"], sort=False))
    assert [list(group.rollout) for _, group in groups] == [[0, 1, 2, 3]] * 4
    assert {group.ground_truth.nunique() for _, group in groups} == {1}
    data = load_split(p, task, "train_rl", 0)
    truths = dict(zip(data["problem_id"], data["ground_truth"], strict=True))
    assert rollouts.ground_truth.tolist() == rollouts.problem_id.map(truths).tolist()
    assert rollouts.completion.tolist() == responses * 4
    pd.testing.assert_frame_equal(rollouts[NAMES].astype(float), recomputed(p, task, rollouts))
    assert rollouts.outcome.groupby(rollouts.problem_id).max().tolist() == [1, 1]
    assert (rollouts.perception != rollouts.outcome).any()

    alpha, trained = (0.3, "perception") if arm == "alpha_0.3" else (0.5, arm)
    mixed = alpha * rollouts[trained] + (1 - alpha) * rollouts.outcome
    by_group = mixed.groupby([rollouts.step, rollouts.problem_id])
    advantage = (mixed - by_group.transform("mean")) / (by_group.transform("std") + 1e-4)
    assert rollouts.advantage.tolist() == pytest.approx(advantage.tolist(), abs=1e-4)
    metrics = run.metrics()
    assert metrics["reward"].tolist() == pytest.approx(mixed.groupby(rollouts.step).mean().tolist(), abs=1e-6)
    for name in NAMES:
        assert metrics[f"reward_{name}"].tolist() == pytest.approx(rollouts.groupby("step")[name].mean().tolist())
    before, after = (load_file(folder / "model.safetensors") for folder in (start.checkpoint, run.checkpoint))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("arm", ["span_routed", "routed_perception", "reweighted_0.3"])
def test_credit_arms_give_every_token_its_advantage(tiny, start, root, script, monkeypatch, arm):
    p = tiny(max_new_tokens=400)
    script(mixed_responses(p, "sudoku"))
    given = []
    loss = rl.RolloutTrainer._compute_loss
    monkeypatch.setattr(rl.RolloutTrainer, "_compute_loss", lambda *args: given.append(args[2]) or loss(*args))
    rollouts = pd.read_parquet(train_arm(p, start, "sudoku", arm, 0).folder / "rollouts.parquet")
    (inputs,) = given
    tokenizer = models.load(start.checkpoint)[1].tokenizer
    texts = tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)  # a step comes shuffled
    written = inputs["completion_mask"].bool()
    seen = perception_mask(tokenizer, inputs["completion_ids"]) & written
    assert seen.any(1).all()
    counts = (written.sum().item(), seen.sum().item())
    for row, text in enumerate(texts):
        by_text = rollouts[rollouts.completion == text].drop_duplicates("problem_id")
        expected = set()
        for _, same in by_text.iterrows():
            group = rollouts[rollouts.problem_id == same.problem_id]
            a, a_p = ((same[k] - group[k].mean()) / (group[k].std() + 1e-4) for k in ("outcome", "perception"))
            scale = (0.3 * counts[0] / counts[1], 0.7 * counts[0] / (counts[0] - counts[1]))
            paid = {"span_routed": (a_p, a), "routed_perception": (a_p, 0.0)}
            both = paid.get(arm, (scale[0] * a, scale[1] * a))
            expected.add(tuple(round(value, 3) for value in both))
        advantages = inputs["advantages"][row]
        (one,), (other,) = advantages[seen[row]].unique(), advantages[written[row] & ~seen[row]].unique()
        assert any((one.item(), other.item()) == pytest.approx(pair, abs=2e-3) for pair in expected)
    stored = rollouts[["advantage_perception", "advantage"]].round(3).to_numpy().tolist()
    given = [
        [inputs["advantages"][row, 0].item(), inputs["advantages"][row][written[row]][-1].item()] for row in range(8)
    ]
    assert sorted(stored) == sorted([round(value, 3) for value in pair] for pair in given)


@pytest.mark.parametrize("arm", ["self_blindfold", "image_dependence"])
def test_an_arm_paid_for_asking_the_model_logs_what_it_was_paid(tiny, start, root, script, arm):
    p = tiny(max_new_tokens=400, rl_lr=1e-2)
    script(mixed_responses(p, "sudoku"))
    run = train_arm(p, start, "sudoku", arm, 0)
    rollouts = pd.read_parquet(run.folder / "rollouts.parquet")
    assert list(rollouts) == [*COLUMNS, *NAMES, arm, "advantage_perception", "advantage"]
    assert rollouts[arm].between(0, 1).all()
    assert run.metrics()[f"reward_{arm}"][0] == pytest.approx(rollouts[arm].mean(), abs=1e-6)
    assert run.metrics().reward[0] == pytest.approx((rollouts[arm] + rollouts.outcome).mean() / 2, abs=1e-6)


@pytest.fixture(scope="module")
def sampled(tiny, base, tmp_path_factory):
    """One real step: two prompts, four sampled rollouts each."""
    folder = tmp_path_factory.mktemp("rl")
    with pytest.MonkeyPatch.context() as patch:
        for room in ("data", "rl"):
            patch.setattr(f"asym.{room}.repo_root", lambda: folder)
        return train_arm(tiny(max_new_tokens=12), Run(base.folder, base.config), "sudoku", "outcome", 0)


def test_a_sampled_step_is_recorded_whole(tiny, sampled):
    rollouts = pd.read_parquet(sampled.folder / "rollouts.parquet")
    assert rollouts.groupby("problem_id").rollout.apply(list).tolist() == [[0, 1, 2, 3]] * 2
    assert rollouts.completion.nunique() > 4
    pd.testing.assert_frame_equal(rollouts[NAMES].astype(float), recomputed(tiny(), "sudoku", rollouts))
    assert not rollouts.completion.str.contains(r"<\|").any()
    assert sampled.done
    assert sorted(path.name for path in sampled.folder.iterdir()) == [
        *("DONE", "checkpoint", "config.json", "manifest.json", "metrics.csv", "rollouts.parquet")
    ]
    metrics = sampled.metrics()
    assert metrics["step"].tolist() == [1]
    assert 0 < metrics["mean_length"][0] <= 12
    assert metrics["entropy"][0] > 0


class Recorder:
    """A function that remembers what it was called with."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.function(*args, **kwargs)


def test_a_group_is_generated_from_one_encoding_of_its_prompt(tiny, start, root, monkeypatch):
    monkeypatch.setattr(rl, "decode", recorded := Recorder(decode))
    p = tiny(rl_temperature=0.7)
    rollouts = pd.read_parquet(train_arm(p, start, "sudoku", "outcome", 0).folder / "rollouts.parquet")
    (((_, inputs, copies), settings),) = recorded.calls
    assert (len(inputs["input_ids"]), copies) == (2, 4)
    assert settings["temperature"] == 0.7
    processor, data = models.load(start.checkpoint)[1], load_split(p, "sudoku", "train_rl", 0)
    order = [data["problem_id"].index(name) for name in rollouts.problem_id[::4]]
    assert settings["forbidden"] == models.image_token_ids(processor)
    chosen = data.select(order)
    texts = [models.chat(processor, query, True) for query in chosen["query"]]
    expected = processor(text=texts, images=chosen["image"][:], padding=True, return_tensors="pt")
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_rollouts_are_written_a_few_groups_at_a_time(tiny, start, root, script, monkeypatch):
    """As many as `eval_batch` says, and each for its own prompt."""
    p = tiny(max_new_tokens=400, eval_batch=4)
    first, second, *_ = mixed_responses(p, "sudoku")
    script([first, first, second, second])
    monkeypatch.setattr(rl, "decode", recorded := Recorder(rl.decode))
    rollouts = pd.read_parquet(train_arm(p, start, "sudoku", "outcome", 0).folder / "rollouts.parquet")
    shown = [inputs["input_ids"] for (_, inputs, _), _ in recorded.calls]
    assert [len(ids) for ids in shown] == [1, 1]
    pixels = [inputs["pixel_values"] for (_, inputs, _), _ in recorded.calls]
    assert not torch.equal(*pixels)
    assert rollouts.groupby("problem_id", sort=False).outcome.apply(list).map(sorted).tolist() == [[0, 0, 1, 1]] * 2


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("path", sorted(repo_root().glob("params/*vl_*.yaml")), ids=lambda path: path.stem)
def test_a_step_of_the_released_studies_is_the_same_on_any_number_of_gpus(path, processes, monkeypatch):
    for room in (rl, training):
        monkeypatch.setattr(room, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    p = Params.load(path)
    rollouts = p.rl_prompts * p.rl_group
    assert share(rollouts, rl.own_passes(p)) * rl.own_passes(p) * processes == rollouts
    assert share(rollouts, rl.own_passes(p)) == max(rollouts // p.rl_accumulation, 1)
    assert share(p.sft_batch) * processes == p.sft_batch


SEEING = ["language", "projector", "vision"]


@pytest.mark.parametrize(
    ("changes", "moving"),
    [
        ({"rl_temperature": 0.7}, 1),  # of two prompts, the second's rollouts have an advantage; then none
        ({}, -1),
        ({"rl_accumulation": 2, "trained_parts": SEEING}, 1),
        ({"lora_rank": 2}, 1),
        ({"family": "internvl", "trained_parts": SEEING}, 1),
    ],
)
def test_an_update_that_encodes_prompts_once_is_the_stock_one(tiny, bases, root, script, monkeypatch, changes, moving):
    """The loss, its gradients and the entropies, also where rollouts have no advantage and thus need no gradient."""
    ours, stock, compared = rl.RolloutTrainer._compute_loss, GRPOTrainer._compute_loss, []
    generator = torch.Generator().manual_seed(0)

    def both(self, model, inputs):
        inputs["advantages"] = torch.randn(len(inputs["prompt"]), generator=generator) * (inputs["prompt"] == moving)
        weights = [q for q in model.parameters() if q.requires_grad]
        for way in (ours, stock):
            loss = way(self, model, inputs)
            grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            compared.append([loss.detach(), *grads, self._metrics["train"]["entropy"][-1]])
        return ours(self, model, inputs)

    monkeypatch.setattr(models, "TOGETHER", 200)
    monkeypatch.setattr(rl.RolloutTrainer, "_compute_loss", both)
    monkeypatch.setattr(rl, "log_probs", recorded := Recorder(rl.log_probs))
    p = tiny(max_new_tokens=400, **changes)
    script([text[: 40 * k] for k, text in enumerate(mixed_responses(p, "sudoku"))])
    train_arm(p, bases(p.family), "sudoku", "outcome", 0)
    assert len(recorded.calls) == 2 * p.rl_accumulation  # for each pass, once to compare, once to train on
    asked = [args for args, _ in recorded.calls[::2]]
    assert sum(len(prompt) for _, _, prompt, *_ in asked) == 8
    assert sum(int(moves.sum()) for *_, moves, _ in asked) == (4 if moving == 1 else 1)
    for found, expected in zip(compared[::2], compared[1::2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any(grad.any() for found in compared for grad in found[1:-1]) == (moving == 1)


def test_a_model_unknown_to_decode_trains_the_stock_way(tiny, start, root, monkeypatch):
    monkeypatch.setattr(decoding, "KNOWN", ())
    monkeypatch.setattr(rl, "decode", None)
    run = train_arm(tiny(max_new_tokens=12), start, "sudoku", "outcome", 0)
    rollouts = pd.read_parquet(run.folder / "rollouts.parquet")
    assert rollouts.groupby("problem_id").rollout.apply(list).tolist() == [[0, 1, 2, 3]] * 2
    pd.testing.assert_frame_equal(rollouts[NAMES].astype(float), recomputed(tiny(), "sudoku", rollouts))


def test_an_adapter_trains_with_a_penalty(tiny, start, root, monkeypatch):
    monkeypatch.setattr(rl, "log_probs", recorded := Recorder(rl.log_probs))
    run = train_arm(tiny(max_new_tokens=12, lora_rank=2, rl_beta=0.1), start, "sudoku", "outcome", 0)
    assert run.metrics()["kl"].abs().max() < 1e-6  # the first step begins at the reference
    assert len(recorded.calls) == 2  # of the reference, and of the policy
    assert (run.checkpoint / "adapter_config.json").exists()


def test_what_an_arm_cannot_be_trained_with_is_told(tiny, bases, start, root, monkeypatch):
    p = tiny(max_new_tokens=12, lora_rank=2)
    adapter = train_arm(p, start, "sudoku", "outcome", 0)
    with pytest.raises(ParamsError, match=r"rl_beta = 0\.1: must be 0 or come with lora_rank where RL starts from an"):
        train_arm(tiny(max_new_tokens=12, rl_beta=0.1), adapter, "sudoku", "outcome", 0)
    several = SimpleNamespace(num_processes=4, wait_for_everyone=lambda: None)
    for room in (rl, training):
        monkeypatch.setattr(room, "PartialState", lambda: several)
    with pytest.raises(ParamsError, match="rl_prompts = 2: must be a multiple of the 4 processes"):
        train_arm(p, start, "sudoku", "outcome", 1)


def test_an_adapter_names_the_start_also_where_its_rollouts_came_from_a_copy(tiny, start, root, monkeypatch):
    """vLLM reads weights from a folder of the run that is gone when the run is done."""
    stock = rl._generation

    def copied(p, run, model, processor):
        model.name_or_path = str(run.folder / "start")
        return stock(p, run, model, processor)

    monkeypatch.setattr(rl, "_generation", copied)
    run = train_arm(tiny(max_new_tokens=12, lora_rank=2), start, "sudoku", "outcome", 0)
    model, _ = models.load(run.checkpoint)
    assert model.name_or_path == str(run.checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"num_beams": 2}},
    ],
    ids=str,
)
def test_sampling_that_decode_does_not_know_is_left_to_trl(vlm, change, tmp_path):
    model, processor = vlm
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_generations": 4, **TRAINING}
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Why?"}]]})
    sizes = []
    for changes in ({}, change):
        trainer = rl.RolloutTrainer(
            model=model,
            args=GRPOConfig(**arguments, **changes),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            train_dataset=data,
            processing_class=processor,
        )
        trainer.model.train()
        sizes.append(trainer._group_size([data[0]["prompt"]] * 4))
    assert sizes == [4, 1]


def test_a_finished_arm_is_reused_and_the_same_twice(tiny, sampled, start, root, monkeypatch):
    p = tiny(max_new_tokens=12)
    again = train_arm(p, start, "sudoku", "outcome", 0)
    assert again.folder.name == sampled.folder.name
    one, other = (pd.read_parquet(run.folder / "rollouts.parquet") for run in (sampled, again))
    pd.testing.assert_frame_equal(one, other)
    monkeypatch.setattr(rl, "RolloutTrainer", None)
    assert train_arm(p, start, "sudoku", "outcome", 0).done
    for changed, arm, seed in ((p, "alpha_0.5", 0), (p, "outcome", 1), (tiny(rl_group=2), "outcome", 0)):
        with pytest.raises(TypeError):  # would train
            train_arm(changed, start, "sudoku", arm, seed)


@pytest.mark.parametrize(("family", "cut"), [("qwen3_vl", 2), ("internvl", 3), ("qwen3_vl", 5), ("qwen3_vl", "end")])
def test_an_interrupted_run_resumes_to_the_same_rollouts_and_weights(tiny, bases, root, monkeypatch, family, cut):
    """In the first or second time through its three steps' worth of prompts, or after the last step."""

    def outcome(task, problems, completions):  # what a tiny model can earn something by
        return [len(text) % 7 / 7 for text in completions]

    p, start = tiny(n_train_rl=6, rl_steps=5, max_new_tokens=12, rl_lr=1e-2, family=family), bases(family)
    monkeypatch.setattr(rl, "REWARDS", (outcome,))
    monkeypatch.setattr(rl, "SAVE_EVERY", 1)
    monkeypatch.setattr("asym.rl.repo_root", lambda: root / "whole")
    whole = train_arm(p, start, "sudoku", "outcome", 0)
    monkeypatch.setattr("asym.rl.repo_root", lambda: root / "cut")
    with monkeypatch.context() as patch:
        steps = itertools.count(1)
        step_end = ProgressCallback.on_step_end

        def on_step_end(self, *args, **kwargs):
            if next(steps) == cut:
                raise KeyboardInterrupt
            step_end(self, *args, **kwargs)

        def save(*_):
            raise KeyboardInterrupt

        patch.setattr(ProgressCallback, "on_step_end", on_step_end)
        if cut == "end":
            patch.setattr(models, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train_arm(p, start, "sudoku", "outcome", 0)
    resumed = train_arm(p, start, "sudoku", "outcome", 0)
    one, other = (pd.read_parquet(run.folder / "rollouts.parquet") for run in (whole, resumed))
    pd.testing.assert_frame_equal(one, other)
    pd.testing.assert_frame_equal(whole.metrics(), resumed.metrics())
    one, other = (load_file(run.checkpoint / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_along_a_training_are_those_it_passed(tiny, start, root, script):
    """Also when they are asked for only after the arm has been trained."""
    p = tiny(rl_steps=3, max_new_tokens=400, rl_lr=1e-2, rl_curve_every=2)
    shorter = p.model_copy(update={"rl_steps": 2, "rl_curve_every": 0})
    script(mixed_responses(p, "sudoku"))
    passed = train_arm(shorter, start, "sudoku", "outcome", 0)
    script(mixed_responses(p, "sudoku"))
    bare = train_arm(p.model_copy(update={"rl_curve_every": 0}), start, "sudoku", "outcome", 0)
    end = train_arm(p, start, "sudoku", "outcome", 0)
    runs = rl.along(p, start, "sudoku", "outcome", 0)
    assert list(runs) == [2, 3]
    assert end.folder == bare.folder == runs[3].folder
    found = [load_file(run.checkpoint / "model.safetensors") for run in (start, *runs.values())]
    for before, after in itertools.pairwise(found):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    same = load_file(passed.checkpoint / "model.safetensors")
    assert all(torch.equal(weights, same[name]) for name, weights in found[1].items())


def test_a_pass_is_as_long_as_its_own_longest_rollout(tiny, start, root, script, monkeypatch):
    """Where each row passes alone, and nothing else changes by it."""
    p = tiny(max_new_tokens=400, rl_accumulation=8, rl_lr=1e-2, credits=["span_routed"])
    script(mixed_responses(p, "sudoku"))
    monkeypatch.setattr(rl.RolloutTrainer, "_shares", False)
    widths, loss = [], GRPOTrainer._compute_loss

    def noting(self, model, inputs):
        widths.append((inputs["completion_ids"].shape[1], int(inputs["completion_mask"].sum())))
        assert inputs["mm_token_type_ids"].shape[1] == inputs["prompt_ids"].shape[1] + widths[-1][0]
        return loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", noting)
    run = train_arm(p, start, "sudoku", "span_routed", 0)
    cut = load_file(run.checkpoint / "model.safetensors")
    assert len(set(widths)) > 1
    assert all(width == written for width, written in widths)
    monkeypatch.setattr(rl, "shortened", lambda inputs: inputs)
    shutil.rmtree(run.folder)
    padded = load_file(train_arm(p, start, "sudoku", "span_routed", 0).checkpoint / "model.safetensors")
    assert any(width > written for width, written in widths)
    for name, weights in padded.items():
        torch.testing.assert_close(cut[name], weights, atol=1e-4, rtol=1e-3)


def test_vllm_gets_one_token_an_image_as_it_expands_them_itself(tiny, start, root, monkeypatch):
    """Its engine is played here: it gets what a tokenizer alone makes of the prompts."""
    p, given = tiny(), []
    tokenize = rl.RolloutTrainer._tokenize_prompts
    processor = models.load(start.checkpoint)[1]
    tokenizer = processor.tokenizer

    def with_vllm(self, prompts):
        self.use_vllm = True
        return tokenize(self, prompts)

    def engine(self, prompt_ids, *_, **__):
        self.use_vllm = False
        given.extend(prompt_ids)
        return [[tokenizer.eos_token_id]] * len(prompt_ids), None

    monkeypatch.setattr(rl.RolloutTrainer, "_tokenize_prompts", with_vllm)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", engine)
    train_arm(p.model_copy(update={"rl_steps": 1}), start, "sudoku", "outcome", 0)
    frames = {models.chat(processor, query, True) for query in load_split(p, "sudoku", "train_rl", 0)["query"]}
    assert {tokenizer.decode(ids) for ids in given} == frames
    assert len(given) == p.rl_prompts * p.rl_group


def test_rl_starts_from_the_sft_arm_of_the_parameters(tiny, base, root):
    p = tiny(rl_start_arm="lambda_0.5", rl_start_steps=1, rl_start_verbosity=2, verbosity=1)
    run = train_start(p, base, "sudoku", 0)
    assert run.config | {"arm": "lambda_0.5", "steps": 1, "verbosity": 2} == run.config


def test_arms_are_those_of_the_parameters():
    asked = {"alphas": [0.2, 0.5], "graded_alphas": [1.0], "surrogates": ["validity"], "credits": ["span_routed"]}
    p = Params().model_copy(update=asked)
    assert rl.arms(p) == ["outcome", "alpha_0.2", "alpha_0.5", "graded_1", "validity", "span_routed"]
    assert rl.arms(Params.model_validate({"alphas": [], "surrogates": ["validity"]})) == ["outcome", "validity"]


def test_an_arm_leaves_the_parts_it_does_not_train_as_they_were(tiny, start, root, script):
    p = tiny(max_new_tokens=400, trained_parts=["language"], rl_lr=1e-2, rl_steps=1)
    script(mixed_responses(p, "sudoku"))
    run = train_arm(p, start, "sudoku", "alpha_0.5", 0)
    before, after = (load_file(each.checkpoint / "model.safetensors") for each in (start, run))
    assert {models.part_of(name) for name in before if not torch.equal(before[name], after[name])} == {"language"}
