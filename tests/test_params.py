import ast
from pathlib import Path

import nbformat
import pytest
import yaml
from pydantic import ValidationError

from asym.params import Params, ParamsError, digest
from asym.runs import repo_root


@pytest.fixture
def complain(tmp_path):
    """Load a parameter file of the given text and return the lines of the error it must raise."""

    def load(text: str, overrides: dict | None = None) -> list[str]:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ParamsError) as caught:
            Params.load(path, overrides)
        return str(caught.value).replace(str(path), "x.yaml").splitlines()

    return load


def test_smoke_file_states_every_default_in_order():
    path = repo_root() / "params" / "smoke.yaml"
    assert Params.load(path) == Params()
    assert list(yaml.safe_load(path.read_text())) == list(Params.model_fields)


@pytest.mark.parametrize("path", sorted(repo_root().glob("params/*.yaml")), ids=lambda path: path.stem)
def test_parameter_files_load_and_name_their_own_study(path):
    assert Params.load(path).study == path.stem


@pytest.mark.parametrize("path", sorted(repo_root().glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_parameters_cells_hold_the_defaults(path: Path):
    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", [])]
    for line in ast.parse(cell.source).body:
        name = (line.target if isinstance(line, ast.AnnAssign) else line.targets[0]).id
        assert ast.literal_eval(line.value) == Params.model_fields[name].default, name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('sft_lr: "fast"', "sft_lr = 'fast': must be a valid number"),
        ("sft_lr: 0", "sft_lr = 0: must be greater than 0"),
        ("rl_beta: .inf", "rl_beta = inf: must be a finite number"),
        ("lambdas: [0.5, 1.5]", "lambdas[1] = 1.5: must be less than or equal to 1"),
        ("tasks: []", "tasks = []: must have at least 1 item"),
        ("alphas: [0.5, 5e-1]", "alphas = [0.5, '5e-1']: must not name the same value twice"),
        ("seeds: 3", "seeds = 3: must be a valid list"),
        ("n_test: true", "n_test = True: must be a valid integer"),
        ("n_test: 2.0", "n_test = 2.0: must be a valid integer"),
        ("study: ../elsewhere", "study = '../elsewhere': must be a folder name"),
        ("data: hub:x/y", "data = 'hub:x/y': must be generated where tasks has several"),
        ("n_train_rl: 3", "rl_prompts = 4: must be at most n_train_rl = 3"),
        ("tasks: [chess]", "tasks[0] = 'chess': must be 'sudoku' or 'graph_coloring'"),
        ("surrogates: [luck]", "surrogates[0] = 'luck': must be 'self_blindfold', 'solver_blindfold'"),
        (
            "credits: [reweighted_2]",
            "credits = ['reweighted_2']: must hold span_routed, routed_perception, or",
        ),
        ("rl_start_arm: lambda_1.5", "rl_start_arm = 'lambda_1.5': must be token_averaged, ngdiff or lambda_"),
        ("image_size: 72", "patch_size = 8: twice its value must divide image_size = 72"),
        ("vertices_min: 7", "vertices_max = 6: must be at least vertices_min = 7"),
        ("blanks_max: 13", "blanks_max = 13: must be at most 12 for sudoku_size = 4"),
        ("heads: 3", "heads = 3: twice its value must divide hidden_size = 64"),
        ("hidden_size: 66", "heads = 2: twice its value must divide hidden_size = 66"),
        ("vision_hidden_size: 36", "vision_hidden_size = 36: must be a multiple of 4 times heads = 2"),
        ("family: internvl\nvision_hidden_size: 33", "vision_hidden_size = 33: must be a multiple of heads = 2"),
        ("rl_accumulation: 3", "rl_accumulation = 3: must divide the 16 rollouts of a step"),
        ("study: bench", "study = 'bench': must be another name: the commands bench and plan write to that folder"),
        ("lambda: 1.5", "lambda = 1.5: unknown parameter, did you mean lambdas?"),
        ("lr: 1", "lr = 1: unknown parameter, did you mean language_lr or vision_lr or sft_lr or rl_lr?"),
        ("epochs: 1", "epochs = 1: unknown parameter, known are study, seeds"),
        ("n_test: 4\nn_test: 5", "n_test: is there 2 times, allowed is once"),
    ],
)
def test_one_clear_line_per_mistake(complain, line, expected):
    lines = complain(line)
    assert lines[0].startswith(f"x.yaml: {expected}")
    assert len(lines) == 1 or line == "heads: 3"  # which fits neither width


def test_all_mistakes_are_told_at_once(complain):
    lines = complain(
        "sft_lr: fast\nlamda: 1\nvertices_min: 9\nseeds: 3\nseeds: 4", {"verbosity": "99", "tasks": "[chess"}
    )
    assert len(lines) == 7
    assert [line for line in lines if line.startswith("--set: ")] == [
        "--set: tasks = '[chess': must be a valid list (puzzles to study)",
        "--set: verbosity = 99: must be less than or equal to 64 (rounds in which the reasoning verifies its solution)",
    ]


NO_MAPPINGS = ["", "- 1", "study", "a: [", "a: 2020-99-99", "\0", "[" * 5000, "? [1]\n: 2"]


@pytest.mark.parametrize("text", NO_MAPPINGS, ids=range(8))
def test_files_that_are_no_mapping(complain, text):
    (line,) = complain(text)
    assert line.startswith("x.yaml: ")


def test_missing_file(tmp_path):
    with pytest.raises(ParamsError, match=r"none\.yaml: cannot be read: No such file"):
        Params.load(tmp_path / "none.yaml")


def test_exponents_are_numbers_however_they_arrive(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("sft_lr: 1e-5\nlambdas: [0, 1e-1]")
    params = Params.load(path, {"rl_lr": "3e-6"})
    assert (params.sft_lr, params.rl_lr, params.lambdas) == (1e-5, 3e-6, [0, 0.1])
    assert Params.from_notebook({"sft_lr": "1e-5"}).sft_lr == 1e-5  # what papermill makes of such a file


def test_notebook_names_that_are_no_parameters_are_left_alone():
    assert Params.from_notebook({"In": [], "frame": 1, "n_test": 5}) == Params(n_test=5)
    with pytest.raises(ParamsError, match="notebook: n_test = 'x'"):
        Params.from_notebook({"n_test": "x"})


def test_params_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Params().threads = 3


def test_digest_depends_on_the_named_fields_only():
    assert Params().digest("sft_lr") == Params(threads=7).digest("sft_lr") != Params(sft_lr=1).digest("sft_lr")
    assert Params().digest() == digest(Params().model_dump()) != Params(threads=7).digest()
    assert Params(sft_lr=1).digest() == Params(sft_lr=1.0).digest()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    with pytest.raises(AttributeError):
        Params().digest("no_such_field")


def test_a_name_that_papermill_injected_and_nobody_knows_is_refused():
    namespace = {"In": ["", "# Parameters\nlamdas = [0.1]\nstudy = 'x'\n"], "lamdas": [0.1], "study": "x", "other": 1}
    with pytest.raises(ParamsError, match=r"lamdas = \[0\.1\].*did you mean lambdas"):
        Params.from_notebook(namespace)


def test_weights_must_have_a_name():
    with pytest.raises(ParamsError, match="four decimals"):
        Params.from_notebook({"lambdas": [1e-5]})


def test_the_order_of_the_trained_parts_makes_no_other_study():
    one, other = (Params(trained_parts=parts) for parts in (["vision", "language"], ["language", "vision"]))
    assert one.digest() == other.digest()
    with pytest.raises(ValueError, match="twice"):
        Params(trained_parts=["vision", "vision"])
