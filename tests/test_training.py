"""What all training shares. That it resumes to the same end is tested where it trains: test_sft.py, test_rl.py."""

import pytest
import torch

from asym import models
from asym.params import ParamsError
from asym.training import Resumable, share, threads


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr("asym.training.PartialState", lambda: type("State", (), {"num_processes": 3}))
    assert share(6) == 2
    with pytest.raises(ParamsError, match="a batch of 8 must be a multiple of the 3 processes"):
        share(8)


def test_threads_are_asked_for_and_given_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_checkpoint_of_a_training_that_cannot_be_read_is_a_plain_error(bases, tmp_path):
    model, processor = models.load(bases("internvl").checkpoint)
    trainer = Resumable.__new__(Resumable)
    trainer.model, trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = model, False, False
    models.save(model, processor, tmp_path)
    with torch.no_grad():
        before = model.get_input_embeddings().weight.clone()
        model.get_input_embeddings().weight.zero_()
    trainer._load_from_checkpoint(str(tmp_path))
    assert torch.equal(model.get_input_embeddings().weight, before)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ParamsError, match="is no checkpoint that can be read"):
        trainer._load_from_checkpoint(str(tmp_path))
