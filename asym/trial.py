"""A few steps of a study's model on the machine at hand: their time, and their memory beside what `plan` computes.

Weights are drawn at random in the sizes of the model, and responses are as long as the study allows: neither time nor
memory depends on what they say. So no weights are downloaded, and what must fit is what is measured.
"""

import gc
import tempfile
from collections.abc import Callable
from contextlib import suppress
from math import lcm, nan
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
from asym.decode import decode, known
from asym.models import IMAGE_TOKENS
from asym.params import Params, ParamsError
from asym.rewards import LABELLED
from asym.rl import GRPO, RolloutTrainer, as_trl, prompts
from asym.runs import progress
from asym.sft import SegmentCollator, SegmentSFTTrainer
from asym.training import TRAINING, one_gpu

STEPS = 3  # of a training that is timed, the first of which does not count
WRITTEN = 32  # tokens of a writing that is timed
FILLER = " so"
COLUMNS = ["study", "device", "quantity", "planned", "measured", "unit"]


def trial(p: Params) -> pd.DataFrame:
    """What steps of SFT and RL and the writing of responses take, by `COLUMNS`; memory is nan without a GPU.

    Memory is what tensors take at most, without the allocator's waste; of SFT, NGDiff's is the one to go by, since all
    arms are probed that way now and then. "planned" is what `plan` says of memory, and of writing on a card with the
    bandwidth that is measured here. A part that does not fit is named, and the others are measured.

    Raises ParamsError as `plan.config_of` does, for several GPUs or processes, and if `decode` does not know the model.
    """
    one_gpu()
    if PartialState().num_processes > 1:
        raise ParamsError("a trial is of one process: leave the launcher out")
    tried = _Trial(p)
    with progress("trial", len(tried.parts)) as bar:
        for part in tried.parts:
            if not tried.fits(part):
                tried.note(f"{part.__name__.replace('_', ' ')}: does not fit", nan, nan, "")
                tried.begin()
            bar.update()
    device = PartialState().device
    table = pd.DataFrame(tried.records, columns=COLUMNS[2:])
    digits = {name: [float(f"{value:.3g}") for value in table[name]] for name in ("planned", "measured")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return table.assign(study=p.study, device=name, **digits)[COLUMNS]


def build(p: Params) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in the sizes of a study's, with random weights; a small processor that gives it as many image tokens."""
    config = plan.config_of(p)
    patch = config.vision_config.patch_size
    p = p.model_copy(update={"patch_size": patch if isinstance(patch, int) else patch[0], "family": config.model_type})
    processor = models.build_processor(vocabulary(p, p.base_seed), p)
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
        self.plain = nan  # seconds of a token without adapters
        self.parts = [self.first_tokens, self.last_tokens, self.token_averaged, self.ngdiff, self.update]
        self.parts += [self.under_adapters] * bool(p.lora_rank)
        self.note("peak of products", nan, self.card.speed, "TFLOP/s")
        self.note("bandwidth of memory", nan, self.card.bandwidth, "GB/s")
        self.begin()

    def begin(self) -> None:
        """A fresh model, and nothing else on the card."""
        self.model = None
        self.forget()
        self.model, self.processor = build(self.p)
        if not known(self.model):
            raise ParamsError("a trial writes by `decode`, which knows attention = 'sdpa' of the two families only")

    def fits(self, part: Callable[[], None]) -> bool:
        """Whether this part of the trial found room; if not, what it held is let go."""
        try:
            part()
        except torch.OutOfMemoryError:
            return False
        return True

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
        """Seconds in which responses, `at_once` of them with room for so many tokens, grow by one behind a prompt.

        Args:
            context: tokens of the prompt, at least; its image comes on top.
        """
        row, copies = self.rows("train_rl", 1)[0], min(self.p.rl_group, self.p.eval_batch)
        text = models.chat(self.processor, self.lengthened(row["query"], context), True)
        n = self.at_once // copies
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

    @property
    def at_once(self) -> int:
        """`eval_batch` responses, in whole groups, for a group's prompt is encoded once."""
        copies = min(self.p.rl_group, self.p.eval_batch)
        return self.p.eval_batch // copies * copies

    def planned(self, context: float) -> float:
        """Seconds that the plan gives a token behind so many."""
        s = self.sizes
        read = s.weights + self.at_once * (s.length.image + context) * s.cache
        return max(read / (self.card.bandwidth * plan.GB * plan.STREAMED), s.layers * plan.LAYER_STEP)

    def first_tokens(self) -> None:
        prompt = self.sizes.length.prompt
        self.plain = self.token(0, self.p.max_new_tokens)
        self.note("writing: one of the first tokens", 1e3 * self.planned(prompt), 1e3 * self.plain, "ms")
        self.memory("writing", "keys and values, evaluation")

    def last_tokens(self) -> None:
        context = round(self.sizes.length.prompt) + self.p.max_new_tokens
        measured = self.token(context, WRITTEN + 1)
        self.note("writing: one of the last tokens", 1e3 * self.planned(context), 1e3 * measured, "ms")
        self.forget()  # keys and values of so long a prompt are kept twice: no study needs that memory

    def under_adapters(self) -> None:
        if not isinstance(self.model, PeftModel):
            return  # the update that leaves them on did not fit
        times = self.token(0, self.p.max_new_tokens) / self.plain
        self.note("writing: under adapters", plan.ADAPTED, times, "times as long")

    # ---- training ----------------------------------------------------------------------------------------------------

    def token_averaged(self) -> None:
        self.sft("token_averaged")

    def ngdiff(self) -> None:
        self.sft("ngdiff")

    def sft(self, arm: str) -> None:
        """Steps of one batch."""
        rows = self.rows("train_sft", STEPS * self.p.sft_batch)
        longest = [self.lengthened(text, self.p.max_new_tokens) for text in rows["response"]]
        rows = rows.remove_columns("response").add_column("response", longest)
        one = {"sft_steps": 1, "sft_accumulation": 1}
        flops = plan.work(self.p.model_copy(update=one), self.sizes)["an SFT arm"]
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
            seconds = self.trained(trainer, unload=True)
        del trainer  # with its optimizer
        self.training(f"SFT, {arm}", flops, seconds, self.p.sft_batch, "activations, SFT")

    def update(self) -> None:
        """The update of RL, without a KL term, on rollouts that say nothing; leaves the adapters on, if any."""
        n = max(1, self.p.rl_prompts * self.p.rl_group // self.p.rl_accumulation)  # rollouts of a pass
        batch = lcm(n, self.p.rl_group)
        batch *= 1 + (batch == n)  # two passes at least
        one = {"rl_steps": 1, "rl_prompts": 1, "rl_group": batch, "rl_beta": 0.0}
        flops = plan.work(self.p.model_copy(update=one), self.sizes)["an RL arm"]
        with tempfile.TemporaryDirectory() as scratch:
            trainer = _Scripted(
                model=self.model,
                args=GRPOConfig(
                    per_device_train_batch_size=n,
                    gradient_accumulation_steps=batch // n,
                    num_generations=self.p.rl_group,
                    max_completion_length=self.p.max_new_tokens,
                    beta=0.0,
                    **GRPO,
                    **self.arguments(scratch),
                ),
                reward_funcs=[as_trl(reward, task_of(self.p, self.p.tasks[0])) for reward in LABELLED],
                train_dataset=prompts(self.rows("train_rl", STEPS * batch // self.p.rl_group)),
                processing_class=self.processor,
                peft_config=models.prepare_training(self.model, self.p),
            )
            trainer.rollouts = Path(scratch) / "rollouts"
            trainer.completion = self.lengthened("", self.p.max_new_tokens)
            seconds = self.trained(trainer, unload=False)
        del trainer
        self.training("RL, update", flops, seconds, batch, "activations, RL")

    def arguments(self, scratch: str) -> dict:
        """What both trainers are told; the first of the steps does not count."""
        told = {"output_dir": scratch, "max_steps": STEPS, "save_strategy": "no", "logging_steps": 1000}
        return told | TRAINING | {"activation_checkpointing": self.p.activation_checkpointing}

    def trained(self, trainer: Trainer, unload: bool) -> float:
        """Seconds of a step; `model` is then the trainer's, without its adapters where they are to be unloaded."""
        trainer, clock = clocked(trainer)
        trainer.train()
        self.model = trainer.model
        if unload and isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        return clock.seconds

    def training(self, kind: str, flops: float, seconds: float, responses: int, activations: str) -> None:
        self.note(f"{kind}: a response", nan, seconds / responses, "s")
        self.note(f"{kind}: share of the peak", nan, flops / seconds / (self.card.speed * 1e12), "")
        self.memory(kind, activations, "gradients", "optimizer")


class _Enough(Exception):
    """A writing has been watched for long enough."""


class _Scripted(RolloutTrainer):
    """Its rollouts are all `completion`, and cost no time."""

    completion: str

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ids = self._tokenizer(self.completion)["input_ids"][: self.max_completion_length]
        return [ids] * len(prompt_ids), None
