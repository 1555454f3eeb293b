"""Several processes: a launch of two trains what one process trains, and leaves the same files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from asym import models
from asym.runs import repo_root

STUDY = {
    **{"hidden_size": 32, "vision_hidden_size": 16, "vision_layers": 1, "image_size": 32, "threads": 1},
    **{
        "n_train_base": 12,
        "n_train_sft": 24,
        "n_train_rl": 2,
        "language_steps": 1,
        "vision_steps": 1,
        "vision_batch": 4,
    },
    **{
        "language_batch": 4,
        "sft_batch": 4,
        "sft_accumulation": 2,
        "sft_steps": 3,
        "curve_every": 2,
        "rl_prompts": 2,
        "rl_steps": 1,
    },
    **{"max_new_tokens": 8, "tasks": ["sudoku"], "rl_start_arm": "token_averaged", "rl_start_steps": 3},
}


def launch(processes: int, arm: str, runs, **changes) -> str:
    """The last checkpoint that `asym train` names, on so many CPU processes that talk over gloo."""
    settings = [f"{key}={json.dumps(value)}" for key, value in (STUDY | changes).items()]
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [*launcher, "asym", "train", arm, "params/smoke.yaml", "--set", *settings]
    around = os.environ | {"ASYM_RUNS": str(runs), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=repo_root(), env=around, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("arm", "changes"), [("token_averaged", {}), ("ngdiff", {}), ("ngdiff", {"lora_rank": 2})])
def test_two_processes_train_what_one_trains(arm, changes, tmp_path):
    one, two = (launch(n, arm, tmp_path / str(n), **changes) for n in (1, 2))
    alone, shared = (pd.read_csv(f"{path}/../metrics.csv") for path in (one, two))
    pd.testing.assert_frame_equal(alone, shared, rtol=2e-3, atol=2e-4)
    assert alone.grad_norm_perception.notna().all()
    weights = [models.load(path)[0].state_dict() for path in map(Path, (one, two))]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=1e-2, atol=2e-4, msg=name)


def test_two_processes_keep_every_rollout_once(tmp_path):
    checkpoint = launch(2, "outcome", tmp_path)
    rollouts = pd.read_parquet(f"{checkpoint}/../rollouts.parquet")
    assert len(rollouts) == 2 * 4
    assert rollouts.completion.nunique() == len(rollouts)  # no two processes draw the same
    assert not rollouts.duplicated(["step", "problem_id", "rollout"]).any()


@pytest.mark.parametrize("path", sorted(repo_root().glob("params/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_the_launcher_reads_the_files_for_it(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value.lower() == path.stem
    assert config.num_processes == 8
