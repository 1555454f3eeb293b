"""Data in the published schema: what is taken from it, what is left out and why, and that ours comes back whole."""

import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from asym import models, published, sft
from asym.data import export, left_out, load_split, training_rows
from asym.params import ParamsError
from asym.published import read_split, segment
from asym.tasks import get_task
from asym.transcript import split

GRID = ((1, 0, 3, 4), (3, 4, 1, 2), (2, 1, 4, 3), (4, 3, 2, 1))
SEEN, SOLVED = (
    json.dumps([[v or "-" for v in row] for row in GRID]),
    json.dumps([[v or 2 for v in row] for row in GRID]),
)


@pytest.fixture
def exported(tiny, root, tmp_path):
    """(parameters, folder of the Sudoku data set that was written from them)."""
    p = tiny(n_test=3, n_train_sft=6, n_train_rl=2, n_validation=2)
    sudoku, _ = export(p, tmp_path / "out")
    return p, sudoku


def test_what_is_exported_comes_back_the_same(exported):
    p, folder = exported
    back = p.model_copy(update={"data": str(folder), "tasks": ["sudoku"]})
    for name in ("train_sft", "train_rl", "validation", "test"):
        ours, theirs = load_split(p, "sudoku", name, 0), load_split(back, "sudoku", name, 0)
        assert theirs.features == ours.features
        for column in ("problem_id", "task", "ground_truth", "perception"):
            assert theirs[column][:] == ours[column][:]
        assert [image.tobytes() for image in theirs["image"]] == [image.tobytes() for image in ours["image"]]
        assert left_out(back, "sudoku", name, 0).empty
    assert (
        load_split(back, "sudoku", "train_sft", 0)["response"][:]
        == load_split(p, "sudoku", "train_sft", 0)["response"][:]
    )
    assert "data/test-*" in (folder / "README.md").read_text()


def test_another_folder_of_the_same_name_is_other_data(exported, tiny, tmp_path):
    p, first = exported
    second, _ = export(tiny(n_test=4, n_train_sft=6, n_train_rl=2, n_validation=2), tmp_path / "again")
    for folder, rows in ((first, 3), (second, 4), (first, 3)):
        assert len(load_split(p.model_copy(update={"data": str(folder), "n_test": 9}), "sudoku", "test", 0)) == rows


def test_other_files_in_the_same_folder_are_other_data(exported, tiny, base, tmp_path):
    p, folder = exported
    p = p.model_copy(update={"data": str(folder), "tasks": ["sudoku"], "n_test": 9})
    assert len(load_split(p, "sudoku", "test", 0)) == 3
    arm = sft.along(p, base, "sudoku", "ngdiff", 0)
    export(tiny(n_test=4, n_train_sft=6, n_train_rl=2, n_validation=2), folder.parent)
    assert len(load_split(p, "sudoku", "test", 0)) == 4
    assert {run.folder for run in sft.along(p, base, "sudoku", "ngdiff", 0).values()}.isdisjoint(
        run.folder for run in arm.values()
    )


def test_responses_longer_than_the_model_may_write_are_left_out_of_sft(exported, base):
    p, folder = exported
    p, (_, processor) = p.model_copy(update={"data": str(folder)}), models.load(base.checkpoint)
    texts = load_split(p, "sudoku", "train_sft", 0)["response"][:]
    lengths = sorted(len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"])
    short = p.model_copy(update={"max_new_tokens": lengths[1] + 1})  # room for an end token
    with pytest.warns(UserWarning, match=f"{sum(n > lengths[1] for n in lengths)} of 6 responses of sudoku are longer"):
        kept = training_rows(short, "sudoku", 0, processor)
    assert len(kept) == sum(n <= lengths[1] for n in lengths)
    none = p.model_copy(update={"max_new_tokens": 8})
    with pytest.raises(ParamsError, match=f"max_new_tokens = 8: must be above {lengths[0]}, the shortest"):
        training_rows(none, "sudoku", 0, processor)


def test_without_a_validation_split_the_end_of_sft_data_is_held_out(exported, tmp_path):
    p, folder = exported
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("  - split: validation\n    path: data/validation-*\n", ""))
    p, task = p.model_copy(update={"data": str(folder)}), get_task("sudoku", size=4, blanks=(5, 8))
    held, _ = read_split(p, task, "validation")
    left, _ = read_split(p, task, "train_sft")
    assert (len(held), len(left)) == (2, 4)
    assert not set(held["ground_truth"]) & set(left["ground_truth"])
    with pytest.raises(ParamsError, match="n_validation = 6 must leave some of the 6 rows"):
        read_split(p.model_copy(update={"n_validation": 6}), task, "validation")


def test_rows_that_cannot_be_used_are_left_out_by_reason(tiny, tmp_path):
    task, problems = get_task("sudoku", size=4, blanks=(5, 8)), [GRID, GRID[::-1], ((0, 2, 3, 4), *GRID[1:])]
    image = published.FEATURES["image"].encode_example(task.draw(GRID, _clean(), _rng()))
    row = lambda truth, response: {"query": "", "image": image, "ground_truth": truth, "response": response}  # noqa: E731
    good = f"I see {SEEN}. The blank must be 2. So {SOLVED}"
    sft = [
        row(json.dumps(GRID), good),
        row(json.dumps(problems[1]), "no idea"),
        row("[1]", good),
        row(json.dumps(problems[2]), good),
    ]
    parts = {"test": [row(json.dumps(problems[2]), "")], "train_sft": sft, "train_rl": sft, "validation": sft[:1]}
    parts["validation"] = [row(json.dumps((GRID[1], GRID[0], *GRID[2:])), "")]
    for name, rows in parts.items():
        path = tmp_path / "d" / "data" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).cast_column("image", published.FEATURES["image"]).to_parquet(path)
    p = tiny(data=str(tmp_path / "d"), n_train_sft=9)
    rows, missing = read_split(p, task, "train_sft")
    assert rows["ground_truth"][:] == [task.ground_truth(GRID)]
    assert split(rows[0]["response"]).reasoning == ". The blank must be 2. So"
    assert dict(missing) == {
        "response: does not state what the image shows": 1,
        "ground truth: ground_truth is not a list of 4 or 9 rows": 1,
        "its problem is in test or validation, too": 1,
    }
    assert len(read_split(p, task, "train_rl")[0]) == 2  # RL needs no response


def _clean():
    from asym.tasks import Drawing

    return Drawing.at(0.0, 32)


def _rng():
    from random import Random

    return Random(0)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (None, "does not state"),
        ("", "does not state"),
        ("[" * 5000, "does not state"),
        (SOLVED, "does not state"),
        (f"{SEEN} is hard", "no correct answer"),
        (f"{SOLVED} then {SEEN}", "no correct answer"),
        (f"{SEEN}{SOLVED}", "no reasoning"),
        (f"{SEEN} <reasoning> {SOLVED}", "tags inside"),
        (f"<perception>{SOLVED}</perception><reasoning>x</reasoning><answer>{SOLVED}</answer>", "does not state"),
        (f"<perception>{SEEN}</perception><reasoning>x</reasoning><answer>{SEEN}</answer>", "no correct answer"),
    ],
)
def test_responses_that_cannot_be_taken_apart_say_why(response, reason):
    with pytest.raises(ValueError, match=reason):
        segment(get_task("sudoku", size=4, blanks=(5, 8)), GRID, response)


def test_the_last_right_answer_counts_and_our_own_grammar_is_kept():
    task = get_task("sudoku", size=4, blanks=(5, 8))
    taken = split(segment(task, GRID, f"Grid: {SEEN}\nMaybe {SEEN}? or [1, 2]. First {SOLVED}, again {SOLVED}."))
    assert taken.reasoning == f"Maybe {SEEN}? or [1, 2]. First {SOLVED}, again"
    own = f"<perception>{SEEN}</perception>\n<reasoning>so it is</reasoning>\n<answer>{SOLVED}</answer>"
    assert segment(task, GRID, own) == own
    graph = get_task("graph_coloring", vertices=(2, 3))
    problem = graph.problem('{"v": 3, "c": 2, "edges": [[0, 1], [1, 2]]}')
    taken = split(segment(graph, problem, 'Edges [[0, 1], [1, 2]] so 1 differs: {"0": "a", "1": "b", "2": "a"}'))
    assert (taken.perception, taken.failure) == ("[[0, 1], [1, 2]]", "")


def test_what_is_seen_may_stand_inside_another_value():
    task = get_task("sudoku", size=4, blanks=(5, 8))
    assert split(segment(task, GRID, f'{{"grid": {SEEN}}} so {SOLVED}')).perception == SEEN


def test_published_data_is_not_exported_as_ours(tiny, tmp_path):
    with pytest.raises(ParamsError, match="data = 'hub:x/y': must be generated"):
        export(tiny(data="hub:x/y"), tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:nobody/nothing", r"cannot be loaded .*hf download --repo-type dataset nobody/nothing"),
        ("no/such/folder", "must be generated, hub:<owner>/<dataset> or a folder that exists"),
    ],
)
def test_data_that_cannot_be_had_says_what_to_do(source, message, monkeypatch):
    def unreachable(name, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(published, "load_dataset", unreachable)
    with pytest.raises(ParamsError, match=message):
        published.fetch(source)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("response", [["a", "list"]], "must hold text in the column response"),
        ("image", ["not drawn"], "must hold images in the column image"),
        ("response", pa.array(["long"], pa.large_string()), ""),
    ],
)
def test_columns_of_another_kind_are_refused(monkeypatch, column, values, message):
    image = published.FEATURES["image"].encode_example(Image.new("RGB", (8, 8)))
    rows = {"query": [""], "image": [image], "ground_truth": ["{}"], "response": [""]} | {column: values}
    data = Dataset(pa.table(rows))
    data = data if column == "image" else data.cast_column("image", published.FEATURES["image"])
    found = DatasetDict(dict.fromkeys(published.SPLITS, data))
    monkeypatch.setattr(published, "load_dataset", lambda name, **options: found)
    if message:
        with pytest.raises(ParamsError, match=message):
            published.fetch("hub:x/y")
    else:
        assert published.fetch("hub:x/y") is found


def test_other_columns_and_splits_are_named(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})["train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ParamsError, match=r"lacks split test, .* column query of train, .*; it has train \(text\)"):
        published.fetch(str(tmp_path))
