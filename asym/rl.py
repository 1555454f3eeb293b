"""Reinforcement learning: TRL's GRPO from an SFT checkpoint, with a reward that may also pay for seeing.

Stated choices, the same for every arm: on-policy (one update per batch of rollouts), advantages normalised within the
prompt group, token-level loss over the batch ("dapo"), clipping at 0.2 (which an on-policy step never reaches), and the
temperature, KL weight and group size of the parameters; a constant learning rate, gradients clipped at norm 1. Arms
differ in what they are paid for (`rewards.weights_of`), some also in which tokens get the credit (`credit.py`).
"""

import re
import shutil
import warnings
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

from asym import credit, models
from asym.data import drawn_by, load_split, task_of
from asym.decode import decode, known, log_probs
from asym.models import image_token_ids
from asym.params import CREDITS, Params, ParamsError
from asym.rewards import LABELLED, SURROGATES, Reward, weights_of
from asym.runs import Run, first, repo_root, write_csv, write_parquet
from asym.self_rewards import SELF_REWARDS, Policy
from asym.tasks import Task
from asym.training import (
    TRAINING,
    ProgressCallback,
    Resumable,
    SnapshotCallback,
    clear,
    share,
    threads,
    whole_weights,
)

# TRL 1.16 asks transformers by a name that is on its way out
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

SAVE_EVERY = 5  # steps; a step is long
REWARDS = (*LABELLED, *SURROGATES)
PROMPT_ROOM = 1024  # tokens of a prompt with its image, at most
GRPO = {"loss_type": "dapo", "epsilon": 0.2, "scale_rewards": "group", "lr_scheduler_type": "constant"}
# What a step hands to its passes by token of a completion, or of prompt and completion
PER_TOKEN = ("completion_ids", "completion_mask", "advantages", "old_per_token_logps", "ref_per_token_logps")
PER_TOKEN += ("sampling_per_token_logps", "importance_sampling_ratio", "mm_token_type_ids")


class RolloutTrainer(Resumable, GRPOTrainer):
    """TRL's `GRPOTrainer`, faster, with every rollout and its rewards kept in `<rollouts>/<step>-<process>.parquet`.

    Rollouts come from `decode`, which encodes the prompt of a group once. Models that it does not know, other ways of
    sampling than by a temperature, other generation back ends and sharded weights take TRL's own way. On a CPU, in one
    process, where no activations are recomputed, their log-probabilities come from `log_probs`, which encodes a prompt
    once, too; and rows without an advantage pass without gradients.

    Attributes, set before training: `rollouts`, the folder; `arm`, whose name says which tokens get the credit;
    `written_at_once`, how many rollouts are written together, in whole groups; `epochs_done`, how often an interrupted
    training has been through all prompts.
    """

    rollouts: Path
    arm = "outcome"
    written_at_once = 256
    epochs_done = 0
    _sharing: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # of a step that `log_probs` scores: prompt of each row, who moves
    )

    def _get_train_sampler(self, *args):
        sampler = super()._get_train_sampler(*args)
        for _ in range(self.epochs_done):  # it draws a new order whenever it starts over, and has not since a restart
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _tokenize_prompts(self, prompts):
        self._copies = self._group_size(prompts)
        ids, images, fields = super()._tokenize_prompts(prompts[:: self._copies])
        if self.use_vllm:  # makes an image's one token into many itself, and would do so again (TRL's issue 6294)
            frame = {"add_generation_prompt": True, "tokenize": False}
            texts = self.processing_class.apply_chat_template(prompts, **frame, **self.chat_template_kwargs)
            self._unexpanded = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        every = lambda rows: rows and [row for row in rows for _ in range(self._copies)]  # noqa: E731
        return every(ids), every(images), fields  # the fields are those of the distinct prompts

    def _group_size(self, prompts) -> int:
        """How many copies of each prompt stand next to each other and can be generated from one encoding."""
        n = self.num_generations
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return 1
        if self.use_vllm or self.use_transformers_continuous_batching or self.tools or not known(self.model):
            return 1
        chosen = (self.top_p, self.top_k or 0, self.min_p or 0.0, self.repetition_penalty)
        if chosen != (1.0, 0, 0.0, 1.0) or set(self.args.generation_kwargs or ()) - {"suppress_tokens"}:
            return 1  # `decode` knows a temperature only
        whole = self.model.training and len(prompts) % n == 0
        return n if whole and all(prompts[k] == prompts[k - k % n] for k in range(len(prompts))) else 1

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        if self._copies == 1:
            prompt_ids = self._unexpanded if self.use_vllm else prompt_ids
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        ids = [torch.tensor(row) for row in prompt_ids[:: self._copies]]
        fields = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]} | multimodal_fields
        padding = {"input_ids": self._tokenizer.pad_token_id}
        for name, rows in fields.items():
            if isinstance(rows, list):  # one entry per token
                rows = [torch.as_tensor(row) for row in rows]
                fields[name] = pad(rows, padding_value=padding.get(name, 0), padding_side="left")
        fields = {name: values.to(self.accelerator.device) for name, values in fields.items()}
        limits = {"max_new_tokens": self.max_completion_length, "temperature": self.temperature}
        limits["forbidden"] = self.generation_config.suppress_tokens or ()
        model, completions = self.accelerator.unwrap_model(self.model_wrapped), []
        model.eval()  # layers in training keep no keys and values where activations are recomputed
        prompts = torch.arange(len(ids), device=model.device)
        for few in prompts.split(max(1, self.written_at_once // self._copies)):
            some = models.take(fields, few, fields["input_ids"].shape[1])
            completions += decode(model, some, self._copies, **limits)
        model.train()
        return completions, None

    @property
    def _shares(self) -> bool:
        """Whether `log_probs` may score the rollouts of a step."""
        # Else each pass must go through the wrapper that joins gradients; layers that recompute keep no keys and values
        alone = self.accelerator.num_processes == 1 and not self.args.activation_checkpointing
        plain = alone and known(self.model) and not self.aux_loss_enabled
        return plain and self.model.training and self.accelerator.device.type == "cpu"

    def _compute_loss(self, model, inputs):
        if self._shares:
            # Without a KL term, rows whose advantage is 0 move nothing; one is kept, or a step might have no gradient
            moving = (inputs["advantages"].view(len(inputs["prompt"]), -1) != 0).any(1) | (self.beta != 0)
            moving[0] |= ~moving.any()
            self._sharing = inputs["prompt"], moving
        else:
            inputs = shortened(inputs)
        loss = super()._compute_loss(model, inputs)
        self._sharing = None
        return loss

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, num_images=None, **kwargs
    ):
        if self._sharing is None or num_images != [1] * len(input_ids):
            score = super()._get_per_token_logps_and_entropies
            return score(model, input_ids, attention_mask, logits_to_keep, *args, num_images=num_images, **kwargs)
        (prompt, moving), width = self._sharing, input_ids.shape[1] - logits_to_keep
        distinct, prompt = prompt.unique(return_inverse=True)
        one_of_each = (prompt == torch.arange(len(distinct), device=prompt.device)[:, None]).int().argmax(1)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        rows = prompt, input_ids[:, width:], attention_mask[:, width:].sum(1), moving
        return *log_probs(model, models.take(inputs, one_of_each, width), *rows, self.temperature), None

    def _calculate_rewards(self, *args):
        self._rewards = super()._calculate_rewards(*args)  # (B, rewards), of all processes
        return self._rewards

    def _ours(self, rows) -> slice:
        """The place of this process's rows among those of all processes of a launch."""
        begin = self.accelerator.process_index * len(rows)
        return slice(begin, begin + len(rows))

    def _token_advantages(self, output) -> torch.Tensor:
        """The advantage of every token (B, T) in the arms of `credit.py`."""
        ids, written = output["completion_ids"], output["completion_mask"].bool()
        seen, weight = credit.perception_mask(self._tokenizer, ids) & written, credit.weight_of(self.arm)
        if weight is not None:
            n_p, n = self.accelerator.reduce(torch.stack([seen.sum(), written.sum()])).tolist()
            return credit.reweighted(weight, seen, output["advantages"], n_p, n)
        ours = self._ours(ids)
        paid = [self._rewards[:, self.reward_func_names.index(name)] for name in ("perception", "outcome")]
        paid = [credit.group_advantages(rewards, self.num_generations)[ours] for rewards in paid]
        perception, outcome = paid
        return credit.routed(seen, perception, 0 * outcome if self.arm == "routed_perception" else outcome)

    def _generate_and_score_completions(self, inputs):
        prompt = torch.arange(len(inputs), device=self.accelerator.device) // self.num_generations
        if self._shares:
            self._sharing = prompt, torch.zeros_like(prompt, dtype=torch.bool)  # of a reference, no gradients
        output = super()._generate_and_score_completions(inputs) | {"prompt": prompt}
        self._sharing = None
        if re.fullmatch(CREDITS, self.arm):
            output["advantages"] = self._token_advantages(output)
        advantages = output["advantages"].view(len(inputs), -1)  # (B, 1) or (B, T)
        ours = self._ours(inputs)
        last = (output["completion_mask"].sum(1) - 1).clamp(0, advantages.shape[1] - 1)
        table = pd.DataFrame(
            {
                "step": self.state.global_step,
                "problem_id": [row["problem_id"] for row in inputs],
                "rollout": [index % self.num_generations for index in range(ours.start, ours.stop)],
                "ground_truth": [row["ground_truth"] for row in inputs],
                "completion": [messages[0]["content"] for messages in list(self._logs["completion"])[ours]],
                **{name: list(values)[ours] for name, values in self._logs["rewards"].items()},
                "advantage_perception": advantages[:, 0].tolist(),
                "advantage": advantages[torch.arange(len(inputs)), last].tolist(),
            }
        )
        part = f"{self.state.global_step:05d}-{self.accelerator.process_index:03d}.parquet"
        write_parquet(self.rollouts / part, table)
        return output


def shortened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rollouts of one pass cut to their own longest; a step pads them to the longest of all."""
    width = inputs["completion_ids"].shape[1]
    surplus = width - int(inputs["completion_mask"].sum(1).max())
    wide = {name for name in PER_TOKEN if name in inputs and inputs[name].dim() == 2 and inputs[name].shape[1] >= width}
    return inputs | {name: inputs[name][:, : inputs[name].shape[1] - surplus] for name in wide}


def as_trl(reward: Reward, task: Task, policy: Policy | None = None) -> Callable[..., list[float]]:
    """A reward in TRL's calling convention, one of `SELF_REWARDS` with its policy; TRL logs it under its name."""

    def function(completions, ground_truth, query, image, **_):
        problems = [task.problem(row) for row in ground_truth]
        texts = [messages[0]["content"] for messages in completions]
        return reward(task, problems, texts, *((query, image, policy) if policy else ()))

    function.__name__ = reward.__name__
    return function


def arms(p: Params) -> list[str]:
    """The RL arms of a study."""
    mixed = [f"alpha_{value:g}" for value in p.alphas] + [f"graded_{value:g}" for value in p.graded_alphas]
    return ["outcome", *mixed, *p.surrogates, *p.credits]


def along(p: Params, start: Run, task: str, arm: str, seed: int) -> dict[int, Run]:
    """The runs of one RL arm on one task by step: every `p.rl_curve_every` steps, and last the arm itself."""
    keys = ("rl_steps", "rl_lr", "rl_prompts", "rl_group", "rl_temperature", "rl_beta", "max_new_tokens", "n_train_rl")
    weights = weights_of(arm, p.surrogate_alpha)
    keys += ("lora_rank", "trained_parts", "dtype", "attention", "vllm")
    config = {key: getattr(p, key) for key in keys} | drawn_by(p, task)
    config |= {"start": start.folder.name, "task": task, "arm": arm, "weights": weights, "seed": seed}
    return Run.along(repo_root(), f"rl-{task}-{arm}", config, p.rl_steps, p.rl_curve_every)


def own_passes(p: Params) -> int:
    """How many of a step's `p.rl_accumulation` forward passes this process makes; of few, each process makes one."""
    return max(1, p.rl_accumulation // PartialState().num_processes)


def train_arm(p: Params, start: Run, task: str, arm: str, seed: int) -> Run:
    """The finished run of one RL arm on one task from the checkpoint of `start`, trained now if it has not been.

    The run holds the checkpoint, `metrics.csv` (by step: rewards, entropy, lengths, norm of the gradient before it is
    clipped, share of groups whose paid rewards are all equal) and `rollouts.parquet`.
    """
    runs = along(p, start, task, arm, seed)
    _, run = runs.popitem()
    with run.locked(together=True):
        if not (run.done and all(snapshot.done for snapshot in runs.values())):
            _train(p, start, run, runs)
    return run


def _train(p: Params, start: Run, run: Run, snapshots: dict[int, Run]) -> None:
    task, arm, seed, weights = (run.config[key] for key in ("task", "arm", "seed", "weights"))
    clear(run, snapshots)
    model, processor = models.load(start.checkpoint, p)
    policy = Policy(model, processor, p.max_new_tokens, p.eval_batch)
    asked = [reward for reward in SELF_REWARDS if reward.__name__ in weights]  # another pass: only for who is paid
    rewards, passes = [*REWARDS, *asked], own_passes(p)
    if p.rl_prompts % (processes := PartialState().num_processes):  # rewards compare the rollouts of a group
        raise ParamsError(f"rl_prompts = {p.rl_prompts}: must be a multiple of the {processes} processes")
    if p.rl_beta and not p.lora_rank and (start.checkpoint / "adapter_config.json").exists():  # TRL takes its base
        raise ParamsError(
            f"rl_beta = {p.rl_beta}: must be 0 or come with lora_rank where RL starts from an adapter, whose folder is "
            "no whole model that the penalty could refer to"
        )
    arguments = GRPOConfig(
        output_dir=str(run.folder / "trainer"),
        max_steps=p.rl_steps,
        learning_rate=p.rl_lr,
        per_device_train_batch_size=share(p.rl_prompts * p.rl_group, passes),
        gradient_accumulation_steps=passes,  # all of them from one generation: a step stays on-policy
        num_generations=p.rl_group,
        max_completion_length=p.max_new_tokens,
        temperature=p.rl_temperature,
        beta=p.rl_beta,
        reward_weights=[weights.get(reward.__name__, 0.0) for reward in rewards],
        logging_steps=1,
        save_steps=SAVE_EVERY,
        seed=seed,
        data_seed=seed,
        **GRPO,
        **_generation(p, run, model, processor),
        **TRAINING | {"activation_checkpointing": p.activation_checkpointing},
    )
    data = load_split(p, task, "train_rl", seed)
    if len(data) < p.rl_prompts:  # the trainer would take no step, and not say so
        raise ParamsError(
            f"rl_prompts = {p.rl_prompts}: must be at most the {len(data)} rows of train_rl that can be used"
        )
    taking = SnapshotCallback(snapshots, processor)
    trainer = RolloutTrainer(
        model=model,
        args=arguments,
        reward_funcs=[as_trl(reward, task_of(p, task), policy if reward in asked else None) for reward in rewards],
        train_dataset=prompts(data),
        processing_class=processor,
        peft_config=models.prepare_training(model, p),
        callbacks=[ProgressCallback(f"RL {task} {arm}"), taking],
    )
    if p.lora_rank:  # not the copy of it that vLLM reads, which does not last
        trainer.model.peft_config["default"].base_model_name_or_path = str(start.checkpoint)
    taking.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.rollouts, trainer.arm, trainer.written_at_once = run.folder / "rollouts", arm, p.eval_batch
    if asked and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ParamsError(
            f"arm {arm}: the model is asked for its reward, which weights in parts cannot answer: use DDP"
        )
    torch.manual_seed(seed + PartialState().process_index)  # else all processes draw the same random numbers
    saved = run.last_trainer_checkpoint()
    done = int(saved.name.removeprefix("checkpoint-")) if saved else 0
    trainer.epochs_done = done // (len(data) // p.rl_prompts)
    if first():  # what an interrupted training wrote beyond its checkpoint, perhaps on more processes
        for part in trainer.rollouts.glob("*.parquet"):
            if int(part.stem.partition("-")[0]) >= done:
                part.unlink()
    trainer.accelerator.wait_for_everyone()
    with threads(p.threads):
        trainer.train(resume_from_checkpoint=saved)
    weights = whole_weights(trainer)
    trainer.accelerator.wait_for_everyone()  # every process has written its rollouts
    if first():
        models.save(trainer.model, processor, run.checkpoint, weights)
        _keep_logs(trainer, run, rewards)
        run.finish()
    trainer.accelerator.wait_for_everyone()


def _generation(p: Params, run: Run, model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, Any]:
    """TRL's arguments for how rollouts are written; no image token may be. Not tested with vLLM itself."""
    forbidden = image_token_ids(processor)
    if not p.vllm:
        return {"generation_kwargs": {"suppress_tokens": forbidden}}
    if first():  # vLLM loads weights from a folder; that of an adapter has none
        models.save(model, processor, run.folder / "start")
    PartialState().wait_for_everyone()
    model.name_or_path = str(run.folder / "start")
    room = {"vllm_max_model_length": PROMPT_ROOM + p.max_new_tokens}  # else the model's own, which fills the card
    # Two engines round differently. By default a response counts only if the product of its tokens' ratios is below 3,
    # which rounding alone can exceed in thousands of tokens: so each ratio is bounded for itself
    return room | {
        "vllm_importance_sampling_mode": "token_truncate",
        "use_vllm": True,
        "vllm_mode": "colocate",
        "generation_kwargs": {"logit_bias": dict.fromkeys(forbidden, -100.0)},
    }


def _keep_logs(trainer: RolloutTrainer, run: Run, rewards: list[Reward]) -> None:
    """Metrics and rollouts from the trainer's own files to the run's, and those away."""
    names = {f"rewards/{reward.__name__}/mean": f"reward_{reward.__name__}" for reward in rewards}
    names |= {"reward": "reward", "entropy": "entropy", "completions/mean_length": "mean_length", "kl": "kl"}
    names |= {"grad_norm": "grad_norm", "frac_reward_zero_std": "groups_without_signal"}
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    columns = [{"step": entry["step"]} | {new: entry.get(old, nan) for old, new in names.items()} for entry in log]
    write_csv(run.folder / "metrics.csv", pd.DataFrame(columns))
    steps = sorted(trainer.rollouts.glob("*.parquet"))
    write_parquet(run.folder / "rollouts.parquet", pd.concat(map(pd.read_parquet, steps), ignore_index=True))
    shutil.rmtree(run.folder / "trainer")  # before the rollouts: with its checkpoint gone, all is done again
    shutil.rmtree(trainer.rollouts)
    shutil.rmtree(run.folder / "start", ignore_errors=True)


def prompts(data: Dataset) -> Dataset:
    """The split as GRPO reads it: conversational prompts beside the image and what the rewards need."""
    kept = data.select_columns(["problem_id", "query", "image", "ground_truth"])
    return kept.add_column("prompt", [[{"role": "user", "content": query}] for query in data["query"]])
