"""A few steps of a study's model on the machine at hand, beside what `plan` computes: its memory, and its assumptions.

Weights are drawn at random in the sizes of the model, and responses are as long as the study allows: neither time nor
memory depends on what they say. So nothing is downloaded, and what must fit is what is measured.
"""

import gc
import tempfile
from contextlib import suppress
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, ProcessorMixin, Trainer
from trl import GRPOConfig, SFTConfig

from asym import models, plan
from asym.balance import balance_of
from asym.base import vocabulary
from asym.bench import clocked, matrix_peak, memory_bandwidth, now
from asym.data import build_split, task_of
from asym.decode import decode
from asym.models import IMAGE_TOKENS
from asym.params import Params
from asym.rewards import LABELLED
from asym.rl import GRPO, RolloutTrainer, as_trl, prompts
from asym.runs import progress
from asym.sft import SegmentCollator, SegmentSFTTrainer
from asym.training import TRAINING

STEPS = 3  # of a training that is timed, the first of which does not count
PASSES = 2  # of which a timed step of RL consists
WRITTEN = 32  # tokens of a writing that is timed
FILLER = " so"
COLUMNS = ["study", "device", "quantity", "planned", "measured", "unit"]


def trial(p: Params) -> pd.DataFrame:
    """What steps of SFT and RL and the writing of responses take, by `COLUMNS`; memory is nan without a GPU.

    "planned" is what `plan` says of it, for a card with the peak and the bandwidth that are measured here. Raises
    ParamsError as `plan.config_of` does.
    """
    tried = _Trial(p)
    with progress("trial", 6) as bar:
        for measure in (tried.writing, tried.sft, tried.rl):
            try:
                measure(bar)
            except torch.OutOfMemoryError:
                tried.note(f"{measure.__name__}: does not fit", nan, nan, "")
                tried.begin()
    device = torch.cuda.get_device_name() if tried.model.device.type == "cuda" else "cpu"
    table = pd.DataFrame(tried.records, columns=COLUMNS[2:]).assign(study=p.study, device=device)
    digits = {name: [float(f"{value:.3g}") for value in table[name]] for name in ("planned", "measured")}
    return table.assign(**digits)[COLUMNS]


def build(p: Params) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in the sizes of a study's, with random weights; a small processor that gives it as many image tokens."""
    config = plan.config_of(p)
    patch = config.vision_config.patch_size
    p = p.model_copy(update={"patch_size": patch if isinstance(patch, int) else patch[0], "family": config.model_type})
    processor = models.build_processor(vocabulary(p, p.seeds[0]), p)
    token = processor.tokenizer.convert_tokens_to_ids
    start, context, video, end = map(token, IMAGE_TOKENS[p.family])
    config.image_token_id = context
    if p.family == "qwen3_vl":
        config.update({"video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end})
    kind = {"dtype": getattr(torch, p.dtype), "attn_implementation": p.attention}
    with torch.device(PartialState().device):
        model = AutoModelForImageTextToText.from_config(config, **kind)
    ends = {"pad_token_id": processor.tokenizer.pad_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends)
    return model, processor


class _Trial:
    """A model, the rows it is tried on, what `plan` says of them, and the records so far."""

    def __init__(self, p: Params):
        self.p, self.records, self.sizes = p, [], plan.Sizes(p)
        for length in (self.sizes.length, self.sizes.rl_length):
            length["response"] = p.max_new_tokens  # the longest there may be
        device, dtype, width = PartialState().device, getattr(torch, p.dtype), self.sizes.width
        peak, bandwidth = matrix_peak(width, dtype, device), memory_bandwidth(device)
        self.card = plan.Card(nan, peak / 1e12, bandwidth / plan.GB, nan)
        self.note("peak of products", nan, self.card.speed, "TFLOP/s")
        self.note("bandwidth of memory", nan, self.card.bandwidth, "GB/s")
        self.begin()

    def begin(self) -> None:
        """A fresh model, and nothing else on the card."""
        self.model = None
        self.forget()
        self.model, self.processor = build(self.p)

    def forget(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def note(self, quantity: str, planned: float, measured: float, unit: str) -> None:
        self.records.append((quantity, planned, measured, unit))

    def memory(self, quantity: str, *parts: str) -> None:
        """Notes the most memory since the last call, beside the weights and those parts of the plan."""
        planned = plan.memory(self.p, self.sizes, self.card)
        held, gpu = sum(planned[part][0] for part in ("weights", *parts)), torch.cuda.is_available()
        most = torch.cuda.max_memory_allocated() / plan.GB if gpu else nan
        self.note(f"memory: {quantity}", held / plan.GB, most, "GB")
        self.forget()

    def rows(self, split: str, count: int) -> Dataset:
        """Rows of the study's first task."""
        return build_split(self.p.model_copy(update={f"n_{split}": count}), self.p.tasks[0], split, 0)

    def lengthened(self, text: str, tokens: int) -> str:
        """The text with words behind it, about so many tokens in all."""
        count = lambda text: len(self.processor.tokenizer(text)["input_ids"])  # noqa: E731
        return text + FILLER * round((tokens - count(text)) / (count(FILLER * 100) / 100))

    # ---- writing -----------------------------------------------------------------------------------------------------

    def token(self, context: int, room: int) -> float:
        """Seconds in which `eval_batch` responses, with room for so many tokens, grow by one behind a longer prompt.

        Args:
            context: tokens of the prompt, at least; its image comes on top.
        """
        row, copies = self.rows("train_rl", 1)[0], min(self.p.rl_group, self.p.eval_batch)
        text = models.chat(self.processor, self.lengthened(row["query"], context), True)
        n = max(1, self.p.eval_batch // copies)
        inputs = self.processor(text=[text] * n, images=[row["image"]] * n, return_tensors="pt").to(self.model.device)
        forbidden, ends = [self.model.generation_config.eos_token_id], []

        def seen(*_) -> None:
            ends.append(now())
            if len(ends) > WRITTEN:
                raise _Enough

        self.model.eval()
        watching = self.model.get_output_embeddings().register_forward_hook(seen)
        with watching, suppress(_Enough):
            decode(self.model, inputs, copies, max_new_tokens=room, temperature=1.0, forbidden=forbidden)
        return float(np.median(np.diff(ends)))

    def writing(self, bar) -> None:
        """Tokens at the beginning and at the end of the longest responses."""
        s, p, layers = self.sizes, self.p, self.sizes.layers

        def planned(context: float) -> float:
            read = s.weights + p.eval_batch * (s.length.image + s.length.prompt + context) * s.cache
            return max(read / (self.card.bandwidth * plan.GB * plan.STREAMED), layers * plan.LAYER_STEP)

        self.plain = self.token(0, p.max_new_tokens)
        self.note("writing: one of the first tokens", 1e3 * planned(0), 1e3 * self.plain, "ms")
        self.note("writing: a layer of it", 1e3 * plan.LAYER_STEP, 1e3 * self.plain / layers, "ms")
        self.memory("writing", "keys and values, evaluation")
        bar.update()
        last = self.token(p.max_new_tokens, WRITTEN + 1)
        self.note("writing: one of the last tokens", 1e3 * planned(p.max_new_tokens), 1e3 * last, "ms")
        self.forget()
        bar.update()

    # ---- training ----------------------------------------------------------------------------------------------------

    def sft(self, bar) -> None:
        """Steps of one batch under two balances."""
        rows = self.rows("train_sft", STEPS * self.p.sft_batch)
        longest = [self.lengthened(text, self.p.max_new_tokens) for text in rows["response"]]
        rows = rows.remove_columns("response").add_column("response", longest)
        flops = plan.work(self.p.model_copy(update={"sft_steps": 1, "sft_accumulation": 1}), self.sizes)["an SFT arm"]
        for arm in ("token_averaged", "ngdiff"):
            with tempfile.TemporaryDirectory() as scratch:
                trainer = SegmentSFTTrainer(
                    model=self.model,
                    args=SFTConfig(
                        per_device_train_batch_size=self.p.sft_batch,
                        max_length=None,
                        dataset_kwargs={"skip_prepare_dataset": True},
                        **self.arguments(scratch),
                    ),
                    train_dataset=rows,
                    processing_class=self.processor,
                    data_collator=SegmentCollator(self.processor),
                    peft_config=models.prepare_training(self.model, self.p),
                    balance=balance_of(arm),
                )
                seconds = self.trained(trainer)
                del trainer  # with its optimizer
            self.training(f"SFT, {arm}", flops, seconds, self.p.sft_batch, "activations, SFT")
            bar.update()

    def rl(self, bar) -> None:
        """The update of a step, on rollouts that say nothing; then writing under the adapters of the study, if any."""
        n = max(1, self.p.rl_prompts * self.p.rl_group // self.p.rl_accumulation)  # rollouts of a pass
        batch = max(PASSES * n, self.p.rl_group)
        one = {"rl_steps": 1, "rl_prompts": 1, "rl_group": batch}
        flops = plan.work(self.p.model_copy(update=one), self.sizes)["an RL arm"]
        with tempfile.TemporaryDirectory() as scratch:
            trainer = _Scripted(
                model=self.model,
                args=GRPOConfig(
                    per_device_train_batch_size=n,
                    gradient_accumulation_steps=batch // n,
                    num_generations=self.p.rl_group,
                    max_completion_length=self.p.max_new_tokens,
                    beta=self.p.rl_beta,
                    **GRPO,
                    **self.arguments(scratch),
                ),
                reward_funcs=[as_trl(reward, task_of(self.p, self.p.tasks[0])) for reward in LABELLED],
                train_dataset=prompts(self.rows("train_rl", max(STEPS, STEPS * batch // self.p.rl_group))),
                processing_class=self.processor,
                peft_config=models.prepare_training(self.model, self.p),
            )
            trainer.rollouts, trainer.completion = (
                Path(scratch) / "rollouts",
                self.lengthened("", self.p.max_new_tokens),
            )
            seconds = self.trained(trainer, unload=False)
            del trainer
        self.training("RL, update", flops, seconds, batch, "activations, RL")
        if self.p.lora_rank:
            times = self.token(0, self.p.max_new_tokens) / self.plain
            self.note("writing: under adapters", plan.ADAPTED, times, "times as long")
        bar.update()

    def arguments(self, scratch: str) -> dict:
        """What both trainers are told; the first of the steps does not count."""
        told = {"output_dir": scratch, "max_steps": STEPS, "save_strategy": "no", "logging_steps": 1000}
        return told | TRAINING | {"activation_checkpointing": self.p.activation_checkpointing}

    def trained(self, trainer: Trainer, unload: bool = True) -> float:
        """Seconds of a step; `model` is then the trainer's, without its adapters where they are to be unloaded."""
        trainer, clock = clocked(trainer)
        trainer.train()
        self.model = trainer.model
        if unload and isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        return clock.seconds

    def training(self, kind: str, flops: float, seconds: float, responses: int, activations: str) -> None:
        peak = self.card.speed * 1e12
        self.note(f"{kind}: a response", flops / responses / (peak * plan.REACHED), seconds / responses, "s")
        self.note(f"{kind}: share of the peak", plan.REACHED, flops / seconds / peak, "")
        self.memory(kind, activations, "gradients", "optimizer")


class _Enough(Exception):
    """A writing has been watched for long enough."""


class _Scripted(RolloutTrainer):
    """Its rollouts are all `completion`, and cost no time."""

    completion: str

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ids = self._tokenizer(self.completion)["input_ids"][: self.max_completion_length]
        return [ids] * len(prompt_ids), None
