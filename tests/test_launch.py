"""Several processes, or a GPU: a launch trains what one process on a CPU trains, and leaves the same files."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from asym import models
from asym.data import build_split
from asym.decode import complete
from asym.params import Params
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


FAMILIES = get_args(Params.model_fields["family"].annotation)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def launch(processes: int, arm: str, runs, cpu: bool = True, deepspeed: bool = False, **changes) -> str:
    """The last checkpoint that `asym train` names, on so many CPU processes that talk over gloo, or on a GPU."""
    settings = [f"{key}={json.dumps(value)}" for key, value in (STUDY | changes).items()]
    launcher = [sys.executable, "-m"]
    if deepspeed:
        file = ["--config_file", "params/accelerate/deepspeed.yaml", "--num_processes", str(processes)]
        launcher += ["accelerate.commands.launch", *file, "-m"]
    elif processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [*launcher, "asym", "train", arm, "params/smoke.yaml", "--set", *settings]
    visible = "" if cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    around = os.environ | {"ASYM_RUNS": str(runs), "CUDA_VISIBLE_DEVICES": visible}
    # Else several processes without a GPU are not taken for a launch; DeepSpeed's are, by a word of its own
    around["ACCELERATE_USE_CPU"] = str(cpu and not deepspeed).lower()
    around |= {"DS_ACCELERATOR": "cpu"} if cpu and deepspeed else {}
    done = subprocess.run(command, cwd=repo_root(), env=around, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arm", "changes"),
    [("token_averaged", {}), ("ngdiff", {}), ("ngdiff", {"lora_rank": 2, "activation_checkpointing": True})],
)
def test_two_processes_train_what_one_trains(arm, changes, tmp_path):
    one, two = (launch(n, arm, tmp_path / str(n), **changes) for n in (1, 2))
    alone, shared = (pd.read_csv(f"{path}/../metrics.csv") for path in (one, two))
    pd.testing.assert_frame_equal(alone, shared, rtol=2e-3, atol=2e-4)
    assert alone.grad_norm_perception.notna().all()
    weights = [models.load(path)[0].state_dict() for path in map(Path, (one, two))]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed, which comes apart")
@pytest.mark.parametrize("arm", ["token_averaged", "outcome"])
def test_deepspeed_trains_what_a_process_alone_trains(arm, tmp_path):
    """As far as one process goes: several need as many GPUs."""
    plain = launch(1, arm, tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "zero", ignore=shutil.ignore_patterns("sft-*", "rl-*"))
    zero = launch(1, arm, tmp_path / "zero", deepspeed=True)
    weights = [models.load(Path(path))[0].state_dict() for path in (plain, zero)]
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], rtol=1e-2, atol=2e-4, msg=name)


def test_two_processes_keep_every_rollout_once(tmp_path):
    checkpoint = launch(2, "outcome", tmp_path)
    rollouts = pd.read_parquet(f"{checkpoint}/../rollouts.parquet")
    assert len(rollouts) == 2 * 4
    assert rollouts.completion.nunique() == len(rollouts)  # no two processes draw the same
    assert not rollouts.duplicated(["step", "problem_id", "rollout"]).any()


@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("arm", "changes"),
    [
        ("token_averaged", {}),
        ("ngdiff", {}),
        ("pcgrad", {}),
        ("ngdiff", {"lora_rank": 2, "activation_checkpointing": True}),
    ],
)
def test_a_gpu_trains_what_a_cpu_trains(family, arm, changes, tmp_path):
    changes = changes | {"family": family}
    slow = launch(1, arm, tmp_path / "cpu", **changes)
    shutil.copytree(tmp_path / "cpu", tmp_path / "gpu", ignore=shutil.ignore_patterns("sft-*"))  # the base is the same
    fast = launch(1, arm, tmp_path / "gpu", cpu=False, **changes)
    assert json.loads(Path(f"{fast}/../manifest.json").read_text())["device"] != "cpu"
    pd.testing.assert_frame_equal(
        *(pd.read_csv(f"{path}/../metrics.csv") for path in (slow, fast)), rtol=5e-3, atol=5e-4
    )


@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ["alpha_0.5", "span_routed", "reweighted_0.5", "self_blindfold"])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "lora_rank": 2, "activation_checkpointing": True}])
def test_a_gpu_finishes_the_arms_of_rl(family, arm, changes, tmp_path):
    arms = {"surrogates": ["self_blindfold"], "credits": ["span_routed", "reweighted_0.5"]}
    checkpoint = launch(1, arm, tmp_path, cpu=False, family=family, **arms, **changes)
    rollouts, log = (pd.read_parquet(f"{checkpoint}/../rollouts.parquet"), pd.read_csv(f"{checkpoint}/../metrics.csv"))
    assert len(rollouts) == 2 * 4
    assert log[["reward", "entropy", "grad_norm"]].notna().all(axis=None)


@gpu
def test_a_gpu_writes_what_a_cpu_writes(vlm, tiny):
    p, (fast, processor) = tiny(), vlm
    slow, rows = deepcopy(fast).cpu(), build_split(p, "sudoku", "test", 0)
    assert fast.device.type == "cuda"
    given = (processor, rows["query"][:], rows["image"][:])
    greedy = [complete(model, *given, max_new_tokens=16, batch=4) for model in (slow, fast)]
    assert greedy[0] == greedy[1]
    drawn = complete(fast, *given, max_new_tokens=16, batch=4, copies=4, temperature=1.0)
    assert len(set(drawn)) > len(rows)


@pytest.mark.parametrize("path", sorted(repo_root().glob("params/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_the_launcher_reads_the_files_for_it(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value.lower() == path.stem
    assert config.num_processes == 8
