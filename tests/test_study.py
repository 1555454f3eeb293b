import json
import re
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from asym.params import Params, ParamsError
from asym.runs import Run, read_manifest, write_json
from asym.study import NotebookError, _portable, check, room_for, run_study

PATHS = "print(study, n_test, Path.cwd(), Path.home())"
FIRST = ["from pathlib import Path", PATHS, "Path('log').open('a').write('1')"]
SECOND = ["from pathlib import Path", "Path('log').open('a').write('2')", "assert Path('fixed').exists(), 'not yet'"]


@pytest.fixture
def repo(tmp_path):
    """A repository of two small notebooks, of which the second fails until there is a file `fixed`, and a study."""
    for name, lines in {"01_first": FIRST, "02_second": SECOND}.items():
        parameters = new_code_cell("study: str = 'smoke'\nn_test: int = 16", metadata={"tags": ["parameters"]})
        cells = [parameters, *map(new_code_cell, lines)]
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=cells), path)
    (tmp_path / "tiny.yaml").write_text("study: tiny\nn_test: 5")
    return tmp_path


def test_a_study_fails_resumes_and_completes(repo):
    params, results = repo / "tiny.yaml", repo / "results" / "tiny"
    with pytest.raises(NotebookError, match=r"02_second, In \[5\]: AssertionError: not yet") as caught:
        run_study(params, root=repo)
    assert "not yet" in Path(str(caught.value).rpartition(" ")[2]).read_text()
    first = read_manifest(results)
    assert not first["complete"]
    assert list(first["notebooks"]) == ["01_first"]
    assert [path.name for path in (results / "notebooks").iterdir()] == ["01_first.ipynb"]

    (repo / "fixed").touch()
    run_study(params, root=repo)
    last = read_manifest(results)
    assert (repo / "log").read_text() == "1212"
    assert last["complete"]
    assert last["study"] == "tiny"
    assert last["params"]["n_test"] == 5
    assert last["notebooks"]["01_first"] > first["notebooks"]["01_first"]
    assert last["seconds"] == pytest.approx(sum(last["notebooks"].values()))
    assert set(last["files"]) == {"results/tiny/notebooks/01_first.ipynb", "results/tiny/notebooks/02_second.ipynb"}

    text = (results / "notebooks" / "01_first.ipynb").read_text()
    assert "tiny 5 . ~" in text
    assert "papermill" not in text
    for path in (str(repo), str(Path.home()), sys.prefix):
        assert path not in text

    run_study(params, ["01"], root=repo)
    assert (results / "notebooks" / "01_first.ipynb").read_text() == text
    assert read_manifest(results)["complete"]
    for only in (["01"], None):
        with pytest.raises(ParamsError, match=r"study = 'tiny': holds results of other parameters \(n_test\): choose"):
            run_study(params, only, {"n_test": "6"}, root=repo)
    assert (results / "notebooks" / "01_first.ipynb").read_text() == text
    assert (repo / "log").read_text() == "12121"
    run_study(params, ["01"], {"workers": "3", "eval_batch": "8"}, root=repo)  # a matter of the machine
    assert (repo / "log").read_text() == "121211"


def test_a_part_of_a_study_can_be_run_first(repo):
    run_study(repo / "tiny.yaml", ["01"], root=repo)
    assert (repo / "log").read_text() == "1"
    assert not read_manifest(repo / "results" / "tiny")["complete"]


def test_the_manifest_tells_which_devices_made_the_runs_of_a_study(repo, monkeypatch):
    monkeypatch.delenv("ASYM_RUNS", raising=False)
    elsewhere = Run.open(repo, "sft-elsewhere", {})
    elsewhere.finish(device="a large card")
    path = repo / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells += map(new_code_cell, ["from asym.runs import Run", "Run.open(Path.cwd(), 'sft-elsewhere', {})"])
    notebook.cells.append(new_code_cell("Run.open(Path.cwd(), 'sft-here', {}).finish()"))
    nbformat.write(notebook, path)
    run_study(repo / "tiny.yaml", ["01"], root=repo)
    made = read_manifest(repo / "results" / "tiny")
    assert made["devices"] == {"a large card": 1, made["device"]: 1}


def test_a_study_that_joins_itself_keeps_what_it_has_and_tells_of_its_parts(repo, monkeypatch):
    monkeypatch.setattr("asym.study.repo_root", lambda: repo)
    (repo / "fixed").touch()
    params, results = repo / "tiny.yaml", repo / "results" / "tiny"
    run_study(params, overrides={"lambdas": "[0.1]"}, root=repo)
    first = read_manifest(results)
    (results / "rows").mkdir()
    (results / "rows" / "kept").touch()

    more = {"lambdas": "[0.9]", "join": "[tiny]"}
    for _ in range(2):  # the second resumes the first
        run_study(params, ["01"], more, root=repo)
        last = read_manifest(results)
        assert last["params"]["lambdas"] == [0.9]
        assert "results/tiny/rows/kept" in last["files"]
        (part,) = last["parts"]
        assert part["params"]["lambdas"] == [0.1]
        assert part["params"]["join"] == []
        assert part["utc"] == first["utc"]
    run_study(params, ["01"], more | {"lambdas": "[0.5]"}, root=repo)
    assert [part["params"]["lambdas"] for part in read_manifest(results)["parts"]] == [[0.1], [0.9]]
    with pytest.raises(ParamsError, match="it has n_test = 5, not 6"):
        run_study(params, ["01"], more | {"n_test": "6"}, root=repo)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vllm": "true"}, "vllm = True: needs the package vllm, which is not installed: set it to false"),
        ({"attention": "flash_attention_2"}, "attention = 'flash_attention_2': needs the package flash_attn"),
        ({"model": "/no/such/model"}, "model = '/no/such/model': is no folder here and cannot be downloaded"),
        ({"data": "/no/such/data", "tasks": "[sudoku]"}, "data = '/no/such/data': must be generated, hub:"),
        ({"start_model": "/no/such/start"}, "start_model = '/no/such/start': must be the folder of a checkpoint"),
        (
            {"vertices_max": "5", "n_train_sft": "300"},
            "n_train_sft = 300: must be at most about 256 of the 1024",
        ),
    ],
)
def test_what_the_machine_lacks_is_told_before_anything_runs(repo, overrides, message):
    with pytest.raises(ParamsError, match=re.escape(message)):
        run_study(repo / "tiny.yaml", None, overrides, root=repo)
    assert not (repo / "results").exists()


def test_a_model_of_another_family_is_refused(repo, bases):
    folder = str(bases("internvl").checkpoint)
    with pytest.raises(ParamsError, match="is of type 'internvl', must be 'qwen3_vl', the parameter `family`"):
        run_study(repo / "tiny.yaml", None, {"model": folder}, root=repo)
    (repo / "fixed").touch()
    run_study(repo / "tiny.yaml", None, {"model": folder, "family": "internvl"}, root=repo)


def test_one_process_that_sees_several_gpus_is_told_to_choose(repo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ParamsError, match=r"8 GPUs are visible .* CUDA_VISIBLE_DEVICES .* --num_processes 8"):
        run_study(repo / "tiny.yaml", root=repo)
    monkeypatch.setenv("RANK", "0")
    check(Params())


def test_too_little_memory_says_what_takes_less(repo):
    path = repo / "notebooks" / "02_second.ipynb"
    cell = new_code_cell("import torch\nraise torch.OutOfMemoryError('CUDA out of memory')")
    nbformat.write(new_notebook(cells=[cell]), path)
    with pytest.raises(NotebookError, match=r"CUDA out of memory\ntoo little memory: lower eval_batch"):
        run_study(repo / "tiny.yaml", root=repo)


@pytest.mark.parametrize(
    ("name", "message", "told"),
    [
        ("OutOfMemoryError", "CUDA out of memory", True),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", True),
        ("ValueError", "No available memory for the cache blocks.", True),
        ("MemoryError", "", True),
        ("TerminatedWorkerError", "... or by an excessive memory usage causing the Operating System to kill it.", True),
        ("OSError", "[Errno 12] Cannot allocate memory", True),
        ("RuntimeError", "shape mismatch", False),
    ],
)
def test_errors_that_tell_of_too_little_memory(name, message, told):
    assert bool(room_for(name, message)) == told


def test_results_from_before_a_parameter_existed_are_those_of_its_default(repo):
    (repo / "fixed").touch()
    run_study(repo / "tiny.yaml", root=repo)
    path = repo / "results" / "tiny" / "manifest.json"
    old = json.loads(path.read_text())
    del old["params"]["vllm"]
    path.write_text(json.dumps(old))
    run_study(repo / "tiny.yaml", ["01"], root=repo)
    with pytest.raises(ParamsError, match=r"holds results of other parameters \(n_test\)"):
        run_study(repo / "tiny.yaml", ["01"], {"n_test": "6"}, root=repo)


@pytest.mark.parametrize(
    ("only", "overrides", "message"),
    [
        (["03"], {}, "--only 03: allowed are the notebooks 01_first, 02_second"),
        (None, {"n_test": "many"}, "--set: n_test = 'many': must be a valid integer"),
        (None, {"study": "taken"}, "study = 'taken': must be a new or empty folder"),
        (None, {"study": "README.md"}, "study = 'README.md': must be the name of a folder"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(repo, only, overrides, message):
    (repo / "results" / "taken").mkdir(parents=True)
    (repo / "results" / "taken" / "table.csv").touch()
    (repo / "results" / "README.md").touch()
    with pytest.raises(ParamsError, match=message):
        run_study(repo / "tiny.yaml", only, overrides, root=repo)
    assert not (repo / "runs").exists()
    assert not (repo / "log").exists()


def test_cleaning_a_notebook_takes_time_linear_in_its_pictures():
    def seconds(size: int) -> float:
        picture = new_output("display_data", data={"image/png": "aB/9" * (size // 4)})
        cell = new_code_cell(outputs=[picture])
        start = time.process_time()
        _portable(new_notebook(cells=[cell]), Path("/nowhere"))
        return time.process_time() - start

    assert seconds(1_000_000) < 40 * max(seconds(100_000), 1e-3)  # quadratic: 100 times


def test_studies_that_join_must_have_made_their_arms_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("asym.study.repo_root", lambda: tmp_path)
    p = Params(study="whole", seeds=[2], join=["first"])
    with pytest.raises(ParamsError, match=r"join: 'first': must be a study with its manifest.json"):
        check(p)
    other = p.model_dump() | {"study": "first", "seeds": [0, 1], "join": [], "lambdas": [0.1, 0.9], "alphas": [1.0]}
    manifest = {"study": "first", "params": {key: value for key, value in other.items() if key != "join"}}
    write_json(tmp_path / "results" / "first" / "manifest.json", manifest)
    check(p)
    manifest["params"] |= {"sft_steps": 9, "verbosity": 3}
    write_json(tmp_path / "results" / "first" / "manifest.json", manifest)
    with pytest.raises(ParamsError, match=r"join: 'first': .* it has verbosity = 3, not 1, sft_steps = 9, not 4"):
        check(p)
