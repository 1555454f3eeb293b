"""Supervised fine-tuning with perception and reasoning weighed apart: TRL's trainer, its loss taken by segment.

The loss of a step is λ·Σ_p/n_p + (1 − λ)·Σ_r/n_r, where Σ and n are sums and counts over the *accumulated* batch: a
batch of 8 and 8 accumulated batches of 1 are the same step. With λ = n_p/(n_p + n_r) it is the stock trainer's loss
(which, for a model that does not take `num_items_in_batch`, averages accumulated batches instead of their tokens).

Where the two gradients are needed apart (NGDiff at every step, the other arms at every `LOG_EVERY`-th), causality
helps: L_p depends only on the prefix up to the end of the perception, so a pass over that prefix gives g_p exactly and
the full pass needs to give only g_r.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from asym import models
from asym.balance import Balance, PerceptionFirst, Segments, TokenAveraged, balance_of
from asym.data import drawn_by, training_rows
from asym.decode import known
from asym.models import chat
from asym.params import Params, ParamsError
from asym.runs import Run, first, repo_root, write_csv
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
from asym.transcript import CLOSING, PERCEPTION, REASONING, segment_ids

LOG_EVERY = 10  # optimizer steps
SAVE_EVERY = 100  # optimizer steps; what an interruption loses at most
METRICS = (
    *("token_share", "loss_perception", "loss_reasoning", "lambda"),
    *("grad_norm_perception", "grad_norm_reasoning", "grad_cosine"),
)


class SegmentCollator:
    """Rows with `query`, `response` and perhaps `image` to one right-padded batch with labels and segment ids.

    The batch holds what the processor returns for the prompts, followed by the response tokens; `labels` and `segments`
    are (B, T), -100 and 0 outside the response. `segments` says which response tokens are perception; in a row whose
    response has no perception span all are reasoning.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"] for row in rows if row.get("image")]
        prompts = [chat(self.processor, row["query"], bool(row.get("image"))) for row in rows]
        batch = self.processor(text=prompts, images=images or None, return_mm_token_type_ids=True)
        tokenizer = self.processor.tokenizer
        columns = {name: [] for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels", "segments")}
        responses = [row["response"] for row in rows]
        tokens = tokenizer(responses, return_offsets_mapping=True, add_special_tokens=False)
        prompted = (batch.pop("input_ids"), batch.pop("mm_token_type_ids"))
        written = (tokens["input_ids"], tokens["offset_mapping"])
        for response, prompt, types, ids, spans in zip(responses, *prompted, *written, strict=True):
            ids, spans = [*ids, tokenizer.eos_token_id], [*spans, (len(response), len(response))]
            segments = segment_ids(response, spans) if CLOSING in response else [REASONING] * len(ids)
            columns["input_ids"].append([*prompt, *ids])
            columns["attention_mask"].append([1] * (len(prompt) + len(ids)))
            columns["mm_token_type_ids"].append([*types, *[0] * len(ids)])
            columns["labels"].append([-100] * len(prompt) + ids)
            columns["segments"].append([0] * len(prompt) + segments)
        padding = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        padded = {
            name: pad_sequence(list(map(torch.tensor, column)), batch_first=True, padding_value=padding.get(name, 0))
            for name, column in columns.items()
        }
        batch.pop("attention_mask")
        return padded | {name: torch.as_tensor(np.asarray(values)) for name, values in batch.items()}


class SegmentSFTTrainer(Resumable, SFTTrainer):
    """TRL's `SFTTrainer` with the loss balanced between segments; batches come from a `SegmentCollator`.

    Logs, averaged over the logging interval: the two losses, λ, and (where they were measured) the two gradient norms
    and their cosine.
    """

    def __init__(self, *args, balance: Balance, **kwargs):
        super().__init__(*args, **kwargs)
        self.sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.sharded and balance.needs_gradients:
            raise ParamsError(
                f"{type(balance).__name__} weighs gradients, which DeepSpeed and FSDP keep in parts: launch with DDP"
            )
        self.balance = balance
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the accumulated batch here, not by Trainer
        self._counts: tuple[int, int] | None = None
        self._grad_p: list[torch.Tensor | None] | None = None  # these three grow with the accumulated batch
        self._loss_p = self._loss_r = 0.0

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """TRL's, but a curriculum warms up and decays anew in its second stage."""
        if not isinstance(self.balance, PerceptionFirst):
            return super().create_scheduler(num_training_steps, optimizer)
        first = round(self.balance.first * num_training_steps)

        def factor(step: int) -> float:
            done, length = (step, first) if step < first else (step - first, num_training_steps - first)
            warmup = -(-self.args.warmup_steps * length // num_training_steps)
            return done / warmup if done < warmup else (length - done) / max(length - warmup, 1)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [sum(int((b["segments"] == s).sum()) for b in batches) for s in (PERCEPTION, REASONING)]
        self._counts = tuple(self._over_processes(*counts))
        return batches, num_items

    def _over_processes(self, *values: float) -> list:
        """Sums over all processes of a launch."""
        return self.accelerator.reduce(torch.tensor(values, device=self.accelerator.device)).tolist()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        segments = inputs.pop("segments")
        counts = self._counts if self.model.training else None
        n_p, n_r = counts or (int((segments == PERCEPTION).sum()), int((segments == REASONING).sum()))
        weight = self.balance.weight(Segments(n_p, n_r, self._progress))
        sum_p, sum_r = self._segment_sums(model, inputs, segments)
        self._log_losses(sum_p, sum_r, n_p, n_r)
        self._log("lambda", weight)
        loss = weight * sum_p / max(n_p, 1) + (1 - weight) * sum_r / max(n_r, 1)
        return loss * (self.accelerator.num_processes if counts else 1)  # gradients are averaged over processes

    def training_step(self, model, inputs, num_items_in_batch=None):
        n_p, n_r = self._counts
        probed = self.state.global_step % self.args.logging_steps == 0 and not self.sharded
        if not (n_p and n_r and (self.balance.needs_gradients or probed)):
            return super().training_step(model, inputs, num_items_in_batch)
        return self._split_step(model, self._prepare_inputs(inputs))

    def _split_step(self, model, inputs) -> torch.Tensor:
        """g_p and g_r accumulated apart and joined at the end of the accumulated batch; returns the detached loss."""
        model.train()
        (n_p, n_r), segments = self._counts, inputs.pop("segments")
        inputs, processes = self._encoded(model, inputs), self.accelerator.num_processes
        parameters = [q for q in model.parameters() if q.requires_grad]
        grad_r, self._grad_p = [q.grad for q in parameters], self._grad_p or [None] * len(parameters)

        _set_grads(parameters, self._grad_p)
        sum_p = torch.zeros((), device=segments.device)
        if (segments == PERCEPTION).any() or processes > 1:  # other micro-batches of the step may hold it all
            sum_p = self._segment_sums(model, *self._prefix(inputs, segments))[0]
            # Images that are encoded once for both passes stay; gradients are averaged over processes
            self.accelerator.backward(processes * sum_p / n_p, retain_graph=self._on_cpu(inputs))
            sum_p = sum_p.detach()
        self._grad_p = [q.grad for q in parameters]

        _set_grads(parameters, grad_r)
        _, sum_r = self._segment_sums(model, inputs, segments)
        self.accelerator.backward(processes * sum_r / n_r)
        sum_p, sum_r = self._log_losses(sum_p, sum_r, n_p, n_r)
        self._loss_p, self._loss_r = self._loss_p + sum_p / n_p, self._loss_r + sum_r / n_r
        weight = TokenAveraged().weight(Segments(n_p, n_r))  # of the reported loss; the step's own is set in the join
        if self.accelerator.sync_gradients:
            weight = self._join(parameters)
        return torch.tensor(weight * sum_p / n_p + (1 - weight) * sum_r / n_r, device=segments.device)

    @staticmethod
    def _prefix(
        inputs: dict[str, torch.Tensor], segments: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The batch cut after its last perception token: all that L_p depends on."""
        seen = (segments == PERCEPTION).any(0)
        end = int(seen.nonzero().max()) + 1 if seen.any() else len(seen)
        per_token = [name for name, values in inputs.items() if getattr(values, "shape", ())[:2] == segments.shape]
        cut = inputs | {name: inputs[name][:, :end] for name in per_token}
        return cut, segments[:, :end]

    @torch.no_grad()
    def _join(self, parameters) -> float:
        """Replace the gradients g_r by λ·g_p + (1 − λ)·g_r; returns λ."""
        grads_p, self._grad_p = self._grad_p, None
        pairs = [(_or_zero(q.grad, q), _or_zero(g, q)) for q, g in zip(parameters, grads_p, strict=True)]
        square = lambda g, h: (g.float() * h.float()).sum()  # noqa: E731
        norm_r, norm_p, product = (
            sum(square(g, h) for g, h in each).item()
            for each in ([(r, r) for r, _ in pairs], [(p, p) for _, p in pairs], pairs)
        )
        norm_r, norm_p = norm_r**0.5, norm_p**0.5
        cosine = product / max(norm_p * norm_r, 1e-30)
        losses, self._loss_p, self._loss_r = (self._loss_p, self._loss_r), 0.0, 0.0
        weight = self.balance.weight(Segments(*self._counts, self._progress, norm_p, norm_r, cosine, *losses))
        for q, (grad_r, grad_p) in zip(parameters, pairs, strict=True):
            q.grad = grad_r.mul_(1 - weight).add_(grad_p, alpha=weight)
        for name, value in zip(METRICS[3:], (weight, norm_p, norm_r, cosine), strict=True):
            self._log(name, value)
        return weight

    def _segment_sums(self, model, inputs, segments) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy of the perception and of the reasoning tokens of a batch."""
        sums, inputs = [0.0, 0.0], self._encoded(model, inputs)
        for part, rows, width in _by_length(inputs) if self._on_cpu(inputs) else [(inputs, ..., None)]:
            losses, kinds = self._losses(model, part), segments[rows][:, 1:width]
            sums = [
                total + (losses * (kinds == s)).sum() for total, s in zip(sums, (PERCEPTION, REASONING), strict=True)
            ]
        return tuple(sums)

    def _on_cpu(self, inputs) -> bool:
        """Whether a batch goes through the model in parts that share their images: what pays off on a CPU."""
        alone = self.accelerator.num_processes == 1  # else every pass must go through the wrapper that joins gradients
        return alone and known(self.model) and inputs["input_ids"].device.type == "cpu"

    def _encoded(self, model, inputs):
        return models.encode_images(model, inputs) if self._on_cpu(inputs) else inputs

    def _losses(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of every next token, (B, T - 1), 0 where there is no label."""
        if not self._on_cpu(inputs):
            return -model(**inputs, fused_lm_head=True).log_probs
        # TRL's fused head spares a GPU's memory, tile by tile; a CPU is faster with the logits of the response at once
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        begin = int((labels != -100).any(0).int().argmax())
        given = {name: values for name, values in inputs.items() if name != "labels"}
        logits = model(**given, use_cache=False, logits_to_keep=labels.shape[1] - begin).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, begin:].flatten(), reduction="none")
        return F.pad(losses.view(len(labels), -1), (begin, 0))[:, :-1]

    def _log_losses(self, sum_p, sum_r, n_p: int, n_r: int) -> tuple[float, float]:
        """Logs L_p and L_r; returns the two sums over all processes."""
        # A sum over each micro-batch, so that the average over the interval is that of whole steps
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        self._log("token_share", n_p / max(n_p + n_r, 1))
        sum_p, sum_r = self._over_processes(sum_p.item(), sum_r.item()) if self.model.training else (sum_p, sum_r)
        for name, total, count in (("loss_perception", sum_p, n_p), ("loss_reasoning", sum_r, n_r)):
            if count:
                self._log(name, steps * float(total) / count)
        return sum_p, sum_r

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)


def token_losses(model, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every next token of a `SegmentCollator`'s batch, 0 where there is no label, and its segment.

    Both (B, T - 1). The batch is left as it is.
    """
    given = {name: values.to(model.device) for name, values in batch.items()}
    segments, labels = given.pop("segments")[:, 1:], given.pop("labels")[:, 1:]
    logits = model(**given, use_cache=False).logits[:, :-1].float() / temperature
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), segments


def _by_length(inputs: dict[str, torch.Tensor]) -> Iterator[tuple]:
    """A right-padded batch in parts of rows of like length, cut to their longest: (part, its rows, its length).

    The parts need no mask: under causal attention nothing sees the padding behind it.
    """
    lengths = inputs["attention_mask"].sum(1)
    inputs = {name: values for name, values in inputs.items() if name != "attention_mask"}
    for rows in models.parts(lengths):
        width = int(lengths[rows[0]])
        yield models.take(inputs, rows, width), rows, width


def _set_grads(parameters, grads) -> None:
    for q, grad in zip(parameters, grads, strict=True):
        q.grad = grad


def _or_zero(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad


def fit(
    run: Run,
    label: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    balance: Balance,
    p: Params,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    accumulation: int = 1,
    snapshots: dict[int, Run] | None = None,
    optimizer: Callable[[PreTrainedModel, float], torch.optim.Optimizer] | None = None,
) -> None:
    """Train (linear decay, 5 % warm-up, gradients clipped at norm 1; AdamW unless told otherwise); resumes by itself.

    Leaves the run finished, with checkpoint and metrics, and a checkpoint in each of `snapshots` (by step).
    """
    arguments = SFTConfig(
        output_dir=str(run.folder / "trainer"),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=share(batch),
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        adam_beta2=0.99,
        logging_steps=LOG_EVERY,
        save_steps=SAVE_EVERY,
        seed=seed,
        data_seed=seed,
        max_length=None,  # truncation would eat image tokens
        dataset_kwargs={"skip_prepare_dataset": True},
        **TRAINING | {"activation_checkpointing": p.activation_checkpointing},
    )
    taking = SnapshotCallback(snapshots or {}, processor)
    trainer = SegmentSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=SegmentCollator(processor),
        peft_config=models.prepare_training(model, p),
        balance=balance,
        optimizers=(optimizer and optimizer(model, lr), None),
        callbacks=[ProgressCallback(label), taking],
    )
    taking.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if steps:  # 0 leaves a stage out; the trainer would take it for "as many as there are"
        with threads(p.threads):
            trainer.train(resume_from_checkpoint=run.last_trainer_checkpoint())
    weights = whole_weights(trainer)
    if first():
        models.save(trainer.model, processor, run.checkpoint, weights)
        log = pd.DataFrame(trainer.state.log_history, columns=["step", *METRICS])
        write_csv(run.folder / "metrics.csv", log.dropna(subset=["loss_reasoning"]))
        shutil.rmtree(run.folder / "trainer", ignore_errors=True)
        run.finish()
    trainer.accelerator.wait_for_everyone()  # what comes next may load it


def arms(p: Params) -> list[str]:
    """The SFT arms of a study."""
    return ["token_averaged", *(f"lambda_{value:g}" for value in p.lambdas), "ngdiff", *p.balances]


def along(p: Params, base: Run, task: str, arm: str, seed: int, steps: int | None = None) -> dict[int, Run]:
    """The runs of one SFT arm on one task by step: every `p.curve_every` steps, and last the arm itself."""
    steps = steps or p.sft_steps
    keys = ("sft_lr", "sft_batch", "sft_accumulation", "lora_rank", "n_train_sft", "verbosity", "variation")
    keys += ("trained_parts", "dtype", "attention", *["n_validation", "max_new_tokens"] * (p.data != "generated"))
    config = {key: getattr(p, key) for key in keys} | drawn_by(p, task)
    config |= {"base": base.folder.name, "task": task, "arm": arm, "seed": seed, "steps": steps}
    return Run.along(repo_root(), f"sft-{task}-{arm}", config, steps, p.curve_every)


def train_arm(p: Params, base: Run, task: str, arm: str, seed: int, steps: int | None = None) -> Run:
    """The finished run of one SFT arm on one task, trained now if it has not been; `steps` default to `p.sft_steps`."""
    runs = along(p, base, task, arm, seed, steps)
    steps, run = runs.popitem()
    with run.locked(together=True):
        if not (run.done and all(snapshot.done for snapshot in runs.values())):
            _train(p, base, run, steps, runs)
    return run


def _train(p: Params, base: Run, run: Run, steps: int, snapshots: dict[int, Run]) -> None:
    task, arm, seed = (run.config[key] for key in ("task", "arm", "seed"))
    torch.manual_seed(seed)
    clear(run, snapshots)
    model, processor = models.load(base.checkpoint, p)
    data, balance = training_rows(p, task, seed, processor), balance_of(arm)
    if isinstance(balance, PerceptionFirst):  # takes more steps, for its first learn from few tokens
        balance, longer = PerceptionFirst.at_equal_tokens(steps, _token_share(data, processor))
        snapshots = {step + longer - steps: snapshot for step, snapshot in snapshots.items()}
        steps = longer
    schedule = {"lr": p.sft_lr, "batch": p.sft_batch, "accumulation": p.sft_accumulation, "seed": seed}
    label = f"SFT {task} {arm}"
    fit(run, label, model, processor, data, balance, p, steps=steps, snapshots=snapshots, **schedule)


def _token_share(data: Dataset, processor: ProcessorMixin) -> float:
    """Perception's share of the response tokens, over the first rows."""
    segments = SegmentCollator(processor)([data[k] for k in range(min(64, len(data)))])["segments"]
    return ((segments == PERCEPTION).sum() / (segments > 0).sum()).item()
