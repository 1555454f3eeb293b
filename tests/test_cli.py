import io
import json
import subprocess
import sys

import pytest
from synthetic import responses

from asym import study
from asym.__main__ import main
from asym.claims import read_claims
from asym.params import Params
from asym.runs import read_manifest, repo_root, write_json, write_parquet
from asym.study import NotebookError

GRID = "[[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]"
PUZZLE = GRID.replace("[[1", "[[0")
SEEN = PUZZLE.replace("0", '"-"')
RIGHT = f"<perception>{SEEN}</perception><reasoning>1.</reasoning><answer>{GRID}</answer>"


@pytest.fixture
def score(monkeypatch, capsys):
    """Run `score --task sudoku` on lines of bytes; return its exit code and what it prints, parsed."""

    def run(*lines: bytes, task: str = "sudoku") -> tuple[int, list[dict]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
        code = main(["score", "--task", task])
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def row(truth, completion) -> bytes:
    return json.dumps({"ground_truth": truth, "completion": completion}).encode()


def test_score_takes_ground_truth_as_object_and_as_text(score):
    perfect = {"a": 1, "a_p": 1, "a_p_graded": 1, "a_own": 1, "parse_failure": ""}
    assert score(row(PUZZLE, RIGHT), row(json.loads(PUZZLE), RIGHT)) == (0, [perfect, perfect])


def test_score_says_why_a_completion_fails(score):
    code, (result,) = score(row(PUZZLE, "no tags"))
    assert code == 0
    assert result["a"] == result["a_p"] == 0
    assert result["parse_failure"]


def test_score_reports_broken_lines_and_goes_on(score):
    broken = [
        b"\xff\xfe",
        b"not json",
        b"[]",
        b'{"completion": ""}',
        row(PUZZLE, 5),
        row("[[1]]", RIGHT),
        row({"v": 2}, RIGHT),
        b"[" * 100_000,
        b'{"ground_truth": ' + b"9" * 5000 + b', "completion": ""}',
        row("[" * 100_000, RIGHT),
        row("9" * 5000, RIGHT),
    ]
    code, results = score(*broken, b"", row(PUZZLE, RIGHT + " " * 1_000_000))
    assert code == 1
    assert [result["line"] for result in results[:-1]] == list(range(1, len(broken) + 1))
    assert all(result["error"] for result in results[:-1])
    assert results[-1]["a"] == 1


def test_score_of_graph_coloring(score):
    response = '<perception>{"v": 2, "edges": [[0, 1]]}</perception><reasoning></reasoning><answer>{}</answer>'
    code, (result,) = score(row({"v": 2, "c": 2, "edges": [[0, 1]]}, response), task="graph_coloring")
    assert code == 0
    assert set(result) == {"a", "a_p", "a_p_graded", "a_own", "parse_failure"}


@pytest.mark.parametrize("command", [["score"], ["screen", "--model", "x"]])
def test_an_unknown_task_is_told(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command, "--task", "chess"])
    assert error.value.code == 2
    assert "invalid choice: 'chess' (choose from 'sudoku', 'graph_coloring')" in capsys.readouterr().err


def test_score_starts_without_torch():
    code = "import sys; from asym.__main__ import main; main(['score', '--task', 'sudoku'])"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (NotebookError("02_x, In [3]: boom"), 1, "boom"),
        (KeyboardInterrupt(), 130, "repeat the same command"),
    ],
)
def test_run_passes_its_arguments_on_and_exits_by_outcome(monkeypatch, capsys, outcome, code, message):
    asked = []

    def run_study(*args):
        asked.append(args)
        if outcome:
            raise outcome

    monkeypatch.setattr(study, "run_study", run_study)
    assert main(["run", "x.yaml", "--only", "02", "03", "--set", "study=y", "--set", "sft_lr=1e-5"]) == code
    assert asked == [("x.yaml", ["02", "03"], {"study": "y", "sft_lr": "1e-5"})]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml: cannot be read"),
        (["params/smoke.yaml", "--set", "sft_lr=fast"], "--set: sft_lr = 'fast': must be a valid number"),
        (["params/smoke.yaml", "--set", "sft_lr"], "'sft_lr' must be key=value"),
        (["params/smoke.yaml", "--only", "99"], "--only 99: allowed are the notebooks"),
    ],
)
def test_a_wrong_request_starts_nothing(arguments, message):
    command = [sys.executable, "-m", "asym", "run", *arguments]
    done = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_screen_ranks_the_surrogates_of_a_checkpoint(base, root, monkeypatch, capsys):
    sizes = ["n_train_rl=4", "n_coupling=2", "coupling_rollouts=2", "max_new_tokens=8", "image_size=32", "bootstrap=10"]
    asked = ["screen", "params/smoke.yaml", "--model", str(base.checkpoint), "--task", "sudoku", "--set", *sizes]
    monkeypatch.chdir(repo_root())
    assert main(asked) == 0
    table = capsys.readouterr().out
    assert "self_blindfold" in table
    assert "within_group" in table
    assert main([*asked[:3], "nowhere", *asked[4:]]) == 2
    assert "nowhere': must be the folder of a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["screen"], ["score"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "usage: python -m asym" in capsys.readouterr().out


def test_claims_are_recomputed_from_stored_rows(tmp_path, capsys):
    results = tmp_path / "results" / "tiny"
    write_parquet(results / "rows" / "sft.parquet", responses({"base": (0.3, 0.1), "token_averaged": (0.4, 0.9)}))
    write_json(results / "manifest.json", {"study": "tiny", "complete": True, "params": Params().model_dump()})
    assert main(["claims", str(results)]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert read_claims(results / "tables" / "claims.csv").set_index("claim").verdict["C1"] == "reproduced"
    renewed = read_manifest(results)
    assert set(renewed["files"]) == {"results/tiny/rows/sft.parquet", "results/tiny/tables/claims.csv"}
    assert renewed["complete"]
    assert main(["claims", str(tmp_path)]) == 2
