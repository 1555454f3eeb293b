"""The base: its two stages' data, its optimizer, and how it is examined."""

import pytest
import torch

from asym import base as stages
from asym import models
from asym.base import muon, own_format, puzzles_as_text, scenes
from asym.data import load_split, problems, task_of
from asym.scoring import score
from asym.transcript import prefill

TASKS = ("sudoku", "graph_coloring")


def test_own_format_reports_the_base_on_its_own_exercises(tiny, base, root):
    rows = own_format(tiny(), base, "sudoku")
    modes = ("transcribe_clean", "transcribe_study", "puzzle_in_words", "puzzle_as_json")
    assert rows["mode"].value_counts().to_dict() == dict.fromkeys(modes, 2)
    assert rows.notna().all(axis=None)


def test_all_seeds_of_post_training_share_the_base(tiny, base, monkeypatch):
    monkeypatch.setattr(stages, "repo_root", lambda: base.folder.parent.parent)
    assert stages.train_base(tiny(seeds=[2, 1])).folder == base.folder


def test_a_released_model_is_the_base_as_it_is_and_is_asked_for_whole_responses(tiny, base, root, monkeypatch):
    p = tiny(model=str(base.checkpoint), prompt_style="full")
    run = stages.train_base(p)
    assert run.checkpoint.resolve() == base.checkpoint.resolve()
    assert stages.train_base(tiny(model=str(base.checkpoint), base_seed=1)).folder == run.folder
    asked = []
    monkeypatch.setattr(
        stages,
        "complete",
        lambda model, processor, queries, images, **limits: asked.append(queries) or [""] * len(queries),
    )
    rows = own_format(p, run, "sudoku")
    assert len(rows) == 4 * p.n_validation
    assert all("<perception>" in query for queries in asked for query in queries)
    clean, study, words, json = (queries[0] for queries in asked)
    assert clean == study
    assert "row 1:" in words
    assert '"-"' in json.split("</answer>")[1]


@pytest.mark.parametrize("name", TASKS)
def test_responses_as_trained_score_full_marks_in_the_own_format(tiny, base, root, name, monkeypatch):
    p = tiny(n_train_base=12, verbosity=0)
    told, shown = puzzles_as_text(p, name, 0), scenes(p, name, 0)
    task = task_of(p, name)
    for index, (row, problem) in enumerate(zip(told, problems(task, "train_base", 0), strict=False)):
        mode = "puzzle_as_json" if index % 2 else "puzzle_in_words"
        result = score(task, problem, stages._whole(task, mode, problem, row["response"]))
        assert (result.a, result.a_p, result.parse_failure) == (1, 1, "")
        assert row["query"] == (stages._as_json(task, problem) if index % 2 else task.describe(problem))
    for row, scene in zip(shown, problems(task, "train_base", 0, scenes=True), strict=False):
        assert row["response"] == f"<perception>{task.transcribe(scene)}</perception>"

    def perfect(model, processor, queries, images, **limits):
        right = load_split(p, name, "validation", 0)
        if images[0] is None and "[" in queries[0]:
            return [row["response"].split("\n", 1)[1] for row in right]
        if images[0] is None:
            return [f"{row['perception']}\n{row['response'].split(chr(10), 1)[1]}" for row in right]
        return [prefill(row["perception"]).strip() for row in right]

    monkeypatch.setattr(stages, "complete", perfect)
    rows = own_format(p, base, name)
    assert (rows[["a", "a_p"]] == 1).all(axis=None)
    assert (rows.parse_failure == "").all()

    monkeypatch.setattr(stages, "complete", lambda model, processor, queries, images, **limits: [""] * len(queries))
    rows = own_format(p, base, name)
    assert (rows.a[rows["mode"].str.startswith("puzzle")] == 0).all()
    assert (rows.a_p[rows["mode"].str.startswith("transcribe")] == 0).all()


def test_muon_moves_every_weight_once_and_only_hidden_matrices_by_muon(base):
    model, _ = models.load(base.checkpoint)
    optimizer = muon(model, 1e-3)
    hidden, others = optimizer.param_groups
    assert {id(w) for w in hidden["params"] + others["params"]} == {id(w) for w in model.parameters()}
    assert len(hidden["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert not any(w is model.get_input_embeddings().weight for w in hidden["params"])
    gate = model.get_decoder().layers[0].mlp.gate_proj.weight
    before, gate.grad = gate.detach().clone(), torch.randn_like(gate)
    optimizer.step()
    step = (before * (1 - 1e-3 * 0.01) - gate).detach() / (1e-3 * 0.2 * max(gate.shape) ** 0.5)
    spectrum = torch.linalg.svdvals(step)  # an orthogonalised step moves every direction by about as much
    assert spectrum.min() > 0.5
    assert spectrum.max() < 1.5
