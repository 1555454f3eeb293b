"""The base: a small VLM with a strong language side and a weaker eye, made in the two stages of a real one.

Language: puzzles as text, half told in words (the response first restates them as JSON), half JSON from the start; the
response reasons briefly and answers. Vision: clean drawings of scenes that cannot be guessed, to be transcribed;
puzzles as text stay in the mix, so that they are not forgotten. Both tasks share one base. It knows what each tag is
for, as a real VLM would, but it has never reasoned at length, nor about an image, nor seen a drawing as hard as the
study's: that is what post-training adds. This models how a real VLM enters post-training; it is a model, not the thing.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
from datasets import Dataset, Image, concatenate_datasets
from pytorch_optimizer import Muon
from transformers import PreTrainedModel

from asym import models
from asym.balance import TokenAveraged
from asym.data import draw, problems, stream, task_of
from asym.decode import complete
from asym.params import Params
from asym.runs import Run, repo_root
from asym.scoring import score
from asym.sft import fit
from asym.tasks import Drawing, Task
from asym.training import threads
from asym.transcript import prefill, tagged

TRANSCRIBE = "Transcribe the image."
TEXT_SHARE = 0.25  # of the vision stage that stays text


def puzzles_as_text(p: Params, name: str, seed: int) -> Dataset:
    """Puzzles as text: every other one told in words and restated as JSON, the rest JSON from the start.

    From words alone the reasoning would learn to look things up in the wording, and fail where only JSON is given, as
    in a response of the study. Nothing is verified: were it, SFT would find reasoning at length already there, and
    only the eye would be left to train.
    """
    task, rows = task_of(p, name), []
    for index, problem in enumerate(itertools.islice(problems(task, "train_base", seed), p.n_train_base)):
        rng = stream(seed, f"{name}/train_base", index, "words")
        reasoning, answer = task.explain(problem, rng, 0, p.variation)
        response = "\n".join((tagged("reasoning", reasoning), tagged("answer", answer)))
        if index % 2:
            rows.append({"query": _as_json(task, problem), "response": response})
        else:
            rows.append({"query": task.describe(problem), "response": f"{task.transcribe(problem)}\n{response}"})
    return Dataset.from_list(rows)


def _as_json(task: Task, problem: Any) -> str:
    asked, _ = task.describe(problem).split(":", 1)
    return f"{asked}: {task.transcribe(problem)}"


def _in_full(task: Task, told: Callable[[Any], str] | None, problem: Any) -> str:
    """The prompt with rules and format, and the puzzle itself where no image shows it."""
    return "\n".join([task.prompt(problem, "full"), *([told(problem)] if told else [])])


def scenes(p: Params, name: str, seed: int) -> Dataset:
    """Clean drawings of random scenes with their transcription."""
    task, clean, rows = task_of(p, name), Drawing.at(0.0, p.image_size), []
    for index, scene in enumerate(itertools.islice(problems(task, "train_base", seed, scenes=True), p.n_train_base)):
        rng = stream(seed, f"{name}/train_base", index, "scene")
        response, image = tagged("perception", task.transcribe(scene)), task.draw(scene, clean, rng)
        rows.append({"query": TRANSCRIBE, "response": response, "image": image})
    return Dataset.from_list(rows).cast_column("image", Image())


def train_base(p: Params) -> Run:
    """What post-training starts from: the run of the vision stage, trained now if it has not been, or `p.model`."""
    if p.model:
        return Run.linked(repo_root(), models.fetch(p.model))
    seed = p.base_seed
    keys = ("tasks", "vertices_min", "vertices_max", "sudoku_size", "blanks_min", "blanks_max", "image_size")
    keys += ("n_train_base", "variation", "hidden_size", "layers", "heads", "vision_hidden_size")
    keys += ("vision_layers", "patch_size", "language_steps", "language_lr", "language_batch", "family")
    config = {key: getattr(p, key) for key in keys} | {"seed": seed}
    language = Run.open(repo_root(), "base-language", config)
    vision_keys = ("vision_steps", "vision_lr", "vision_batch")
    vision = Run.open(repo_root(), "base", config | {key: getattr(p, key) for key in vision_keys})
    with language.locked(together=True), vision.locked(together=True):
        if not vision.done:
            _train_stages(p, seed, language, vision)
    return vision


def _train_stages(p: Params, seed: int, language: Run, vision: Run) -> None:
    parts = Params.model_fields["trained_parts"].default
    alone = p.model_copy(update={"lora_rank": 0, "trained_parts": parts, "threads": p.threads * p.workers})
    texts = concatenate_datasets([puzzles_as_text(p, name, seed) for name in p.tasks])
    if not language.done:
        processor = models.build_processor([*texts["query"], *texts["response"], *vocabulary(p, seed)], p)
        model = models.build_model(processor, p, seed)
        schedule = {"steps": p.language_steps, "lr": p.language_lr, "batch": p.language_batch}
        schedule |= {"seed": seed, "optimizer": muon}
        fit(language, "base: language", model, processor, texts, TokenAveraged(), alone, **schedule)
    model, processor = models.load(language.checkpoint, p)
    drawings = concatenate_datasets([scenes(p, name, seed) for name in p.tasks])
    share = round(len(drawings) * TEXT_SHARE / (1 - TEXT_SHARE))
    kept = texts.shuffle(seed=seed).select(range(min(share, len(texts))))
    mixed = concatenate_datasets([drawings, kept])
    schedule = {"steps": p.vision_steps, "lr": p.vision_lr, "batch": p.vision_batch}
    schedule |= {"seed": seed, "optimizer": muon}
    fit(vision, "base: vision", model, processor, mixed, TokenAveraged(), alone, **schedule)


def muon(model: PreTrainedModel, lr: float) -> Muon:
    """Muon for the hidden matrices, AdamW for all else: it learns to reason in fewer steps than with AdamW alone.

    Muon (Jordan et al., 2024) steps along the orthogonalised momentum, scaled to the size of AdamW's steps (Liu et al.,
    arXiv 2502.16982), so that one learning rate serves both. It makes the base only: post-training has AdamW,
    as usual.
    """
    hidden, others = [], []
    for name, weights in model.named_parameters():
        (hidden if weights.ndim >= 2 and "embed" not in name else others).append(weights)
    groups = [{"params": hidden, "use_muon": True, "use_adjusted_lr": True}, {"params": others, "use_muon": False}]
    return Muon([group | {"lr": lr, "weight_decay": 0.01} for group in groups])


def vocabulary(p: Params, seed: int) -> Iterator[str]:
    """Texts of the kinds the base does not train on but will meet: the tokenizer should know their words."""
    yield TRANSCRIBE
    for name in p.tasks:
        task = task_of(p, name)
        for index, problem in enumerate(itertools.islice(problems(task, "train_base", seed), 200)):
            yield from (task.prompt(problem, "brief"), task.prompt(problem, "full"))
            yield from task.explain(problem, stream(seed, f"{name}/train_base", index, "vocabulary"), 8, 1.0)


def own_format(p: Params, base: Run, name: str) -> pd.DataFrame:
    """How good the base is at what it was trained for, on the validation problems: the study's regime is read off here.

    Returns:
        One row per response: task, family, stage, arm, seed, mode, problem_id, ground_truth, completion, a, a_p,
        a_p_graded, parse_failure. `mode` is transcribe_clean or transcribe_study (drawings; a_p counts) or
        puzzle_in_words or puzzle_as_json (text; a counts). The completions are in the base's own formats; a released
        model has none for these tasks and is asked for whole responses.
    """
    task, rows = task_of(p, name), []
    chosen = list(itertools.islice(problems(task, "validation", 0), p.n_validation))
    easy = p.model_copy(update={"difficulty_sudoku": 0.0, "difficulty_graph_coloring": 0.0})
    drawings = {"transcribe_clean": easy, "transcribe_study": p}
    model, processor = models.load(base.checkpoint, p)
    asked = dict.fromkeys(drawings, lambda _: TRANSCRIBE)
    asked |= {"puzzle_in_words": task.describe, "puzzle_as_json": partial(_as_json, task)}
    if p.model:
        asked = {mode: partial(_in_full, task, None if mode in drawings else told) for mode, told in asked.items()}
    for mode, query in asked.items():
        rng, queries = stream(0, f"{name}/validation", 0, mode), list(map(query, chosen))
        images = [draw(drawings[mode], name, problem, rng) if mode in drawings else None for problem in chosen]
        limits = {"max_new_tokens": p.max_new_tokens, "batch": p.eval_batch, "label": f"base {name} {mode}"}
        with threads(p.threads * p.workers):
            completions = complete(model, processor, queries, images, **limits)
        for index, (problem, text) in enumerate(zip(chosen, completions, strict=True)):
            scores = score(task, problem, text if p.model else _whole(task, mode, problem, text))
            row = {"mode": mode, "problem_id": f"{name}/validation/{index}", "ground_truth": task.ground_truth(problem)}
            row |= {"completion": text, "a": scores.a, "a_p": scores.a_p, "a_p_graded": scores.a_p_graded}
            row["parse_failure"] = scores.parse_failure
            rows.append(row)
    about = {"task": name, "family": p.family, "stage": "base", "arm": "base", "seed": p.seeds[0]}
    return pd.DataFrame(rows).assign(**about)[[*about, *rows[0]]]


def _whole(task: Task, mode: str, problem: Any, text: str) -> str:
    """A response as the study has it: what was not asked for is supplied, and right."""
    if mode == "puzzle_as_json":
        return prefill(task.transcribe(problem)) + text
    if mode == "puzzle_in_words":
        seen, _, rest = text.partition("\n")
        return prefill(seen) + rest
    return "\n".join((text, tagged("reasoning", ""), tagged("answer", task.answer(problem))))
