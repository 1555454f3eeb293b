"""Set before torch is imported anywhere: tests run side by side, so one thread each, and no bars among their output."""

import os

os.environ["ASYM_PROGRESS"] = "off"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from functools import cache
from typing import get_args

import hypothesis
import pytest

from asym.params import Params

# The same examples at every run, and no deadline: a busy machine is not a failure.
hypothesis.settings.register_profile("asym", deadline=None, derandomize=True)
hypothesis.settings.load_profile("asym")

FAMILIES = get_args(Params.model_fields["family"].annotation)
ROOMS = ("data", "sft", "base", "evaluate", "imbalance", "rl", "screen", "start")  # those that open run folders


def _tiny(**changes) -> Params:
    sizes = {"hidden_size": 32, "layers": 2, "vision_hidden_size": 16, "vision_layers": 1, "image_size": 32}
    splits = {"n_train_base": 12, "n_train_sft": 12, "n_train_rl": 2, "n_validation": 2, "n_test": 4, "n_coupling": 2}
    steps = {"language_steps": 1, "vision_steps": 1, "language_batch": 4, "vision_batch": 4, "sft_steps": 2}
    steps |= {"sft_batch": 4, "max_new_tokens": 8, "rl_prompts": 2, "rl_steps": 1, "threads": 1, "curve_every": 0}
    return Params().model_copy(update=sizes | splits | steps | changes)


@pytest.fixture(scope="session")
def tiny():
    """Parameters of a study that trains in a second (narrow layers, four image tokens), with changes."""
    return _tiny


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository root of the test's own: nothing is written to, or found in, the real `runs/`."""
    for room in ROOMS:
        monkeypatch.setattr(f"asym.{room}.repo_root", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The finished run of a tiny base of a family for both tasks, through both of its stages, made when first asked."""
    from asym.base import train_base

    @cache
    def base_of(family: str):
        folder = tmp_path_factory.mktemp("base")
        with pytest.MonkeyPatch.context() as patch:
            for room in ROOMS:
                patch.setattr(f"asym.{room}.repo_root", lambda: folder)
            return train_base(_tiny(family=family))

    return base_of


@pytest.fixture(scope="session")
def base(bases):
    """The tiny base of the first family."""
    return bases(FAMILIES[0])


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """The folder of a released model with its sizes shrunk, made when first asked."""
    import release

    @cache
    def folder_of(name: str):
        folder = tmp_path_factory.mktemp("released")
        release.write(name, folder)
        return folder

    return folder_of


@pytest.fixture
def drawing():
    """Figures in the study's style, drawn without a screen, and closed after the test."""
    import matplotlib.pyplot as plt

    from asym import figures

    plt.switch_backend("Agg")
    with plt.rc_context():
        figures.style()
        yield
    plt.close("all")


@pytest.fixture(params=FAMILIES)
def vlm(request, bases):
    """(model, processor) of the tiny base of either family, fresh for every test."""
    from asym import models

    return models.load(bases(request.param).checkpoint)
