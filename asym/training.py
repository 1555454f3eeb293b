"""What supervised and reinforcement training share: TRL's arguments, resuming, callbacks, the processes of a launch.

Launches are those of torchrun and `accelerate launch`; without one, a process is alone.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import ProcessorMixin, Trainer, TrainerCallback

from asym import models
from asym.params import ParamsError
from asym.runs import Run, first, progress

TRAINING = {  # what SFT and RL share: TRL's arguments that are choices of this project, not of a study
    "save_total_limit": 1,
    "activation_checkpointing": False,
    "bf16": False,  # weights have the number format of the study, `dtype`; nothing is cast on the way
    "remove_unused_columns": False,
    "ddp_broadcast_buffers": False,  # none changes
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
}


class Resumable(Trainer):
    """A trainer whose own checkpoints resume, whatever the model calls its weights on disk."""

    def _save_checkpoint(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:  # a trainer resumed from its last step takes one more
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        # InternVL's are saved under the names of its releases. The trainer of transformers looks for the module's own,
        # finds none, warns, and goes on from the weights that it has
        saved = models.all_weights(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())


class ProgressCallback(TrainerCallback):
    """Shows a trainer's steps on the study's own bar."""

    def __init__(self, label: str):
        self.label, self.bar = label, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress(self.label, state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class SnapshotCallback(TrainerCallback):
    """Saves the model after some steps, each to a run of its own, so that accuracy can be measured along training."""

    def __init__(self, snapshots: dict[int, Run], processor: ProcessorMixin):
        self.snapshots, self.processor = snapshots, processor
        self.trainer: Trainer | None = None  # set when there is one

    def on_step_end(self, args, state, control, model, **kwargs):
        run = self.snapshots.get(state.global_step)
        if run and not run.done:
            weights = whole_weights(self.trainer)
            if first():
                models.save(model, self.processor, run.checkpoint, weights)
                run.finish()


def clear(run: Run, snapshots: dict[int, Run]) -> None:
    """Away with what an earlier training of the run left that this one cannot use."""
    if first():
        (run.folder / "DONE").unlink(missing_ok=True)  # trained before snapshots were asked for
        saved = run.last_trainer_checkpoint()
        passed = int(saved.name.removeprefix("checkpoint-")) if saved else 0
        if not all(snapshot.done for step, snapshot in snapshots.items() if step <= passed):
            shutil.rmtree(run.folder / "trainer")  # a snapshot that it lacks lies behind: from the start
    if PartialState().num_processes > 1:
        PartialState().wait_for_everyone()


def one_gpu() -> None:
    """Raises ParamsError where a process that no launcher started sees several: trainers multiply the batch by them."""
    if (seen := torch.cuda.device_count()) > 1 and "RANK" not in os.environ:
        raise ParamsError(
            f"{seen} GPUs are visible to one process: set CUDA_VISIBLE_DEVICES to one of them, or train the arms first "
            f"by `accelerate launch --num_processes {seen} -m asym train`"
        )


def share(batch: int, passes: int = 1) -> int:
    """What one process of a launch takes of a batch at a time. Raises ParamsError if it cannot be shared out evenly."""
    one_gpu()
    processes = PartialState().num_processes
    if batch % (processes * passes):
        parts = f"{processes} processes" + f" times {passes} passes" * (passes > 1)
        raise ParamsError(f"a batch of {batch} must be a multiple of the {parts} that share it")
    return batch // processes // passes


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The weights of a model that a launch has spread over its processes; all of them must ask. None if it has not."""
    spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if spread else None


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run torch on `n` threads: what a study asks for, not what the machine has, decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
