"""The paper's setting in small: a checkpoint from disk, data in the published schema, LoRA, bfloat16, both families."""

import pytest
import torch

from asym import models
from asym.base import train_base
from asym.data import export
from asym.evaluate import measure
from asym.params import ParamsError
from asym.rl import train_arm as train_rl
from asym.rl import train_start
from asym.sft import train_arm


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_a_released_model_goes_through_sft_and_rl_on_published_data(family, bases, tiny, root, tmp_path):
    folder, _ = export(tiny(prompt_style="full"), tmp_path / "data")
    p = tiny(
        **{"family": family, "model": str(bases(family).checkpoint), "data": str(folder), "tasks": ["sudoku"]},
        **{"dtype": "bfloat16", "lora_rank": 2, "activation_checkpointing": True, "trained_parts": ["language"]},
        **{"rl_start_arm": "ngdiff", "rl_start_steps": 2, "rl_accumulation": 2, "prompt_style": "full"},
    )
    base = train_base(p, 0)
    tuned = train_arm(p, base, "sudoku", "ngdiff", 0)
    assert tuned.metrics().grad_norm_perception.gt(0).all()
    start = train_start(p, base, "sudoku", 0)
    assert start.folder == tuned.folder
    with pytest.raises(ParamsError, match="rl_prompts = 3: must be at most the 2 rows of train_rl"):
        train_rl(p.model_copy(update={"rl_prompts": 3, "n_train_rl": 3}), start, "sudoku", "alpha_0.5", 0)
    run = train_rl(p, start, "sudoku", "alpha_0.5", 0)
    assert (run.checkpoint / "adapter_model.safetensors").exists()
    assert not (run.checkpoint / "model.safetensors").exists()
    model, _ = models.load(run.checkpoint, p)  # two adapters deep
    assert {weights.dtype for name, weights in model.named_parameters()} == {torch.bfloat16}
    rows = measure(p, run, "sudoku", "rl", "alpha_0.5", 0)
    assert len(rows) == 2 * p.n_test
    assert rows.problem_id.str.startswith("sudoku/test/").all()
