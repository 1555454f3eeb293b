"""The command line: `python -m asym run` executes a study, `plan` says what it will need, `train` trains one arm of
it, `screen` ranks label-free rewards on a checkpoint, `runs pack` and `runs unpack` carry finished runs elsewhere,
`data export` writes a study's data for others, `bench` measures speed, `score` scores responses, `claims` recomputes a
study's claims from its stored rows.

Exit codes: 0 done, 1 something failed, 2 nothing was started because the request is wrong, 130 interrupted.
"""

import argparse
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

from asym.params import Params, ParamsError, Task
from asym.runs import first


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except ParamsError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: repeat the same command to resume.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left; keep the interpreter from flushing into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        from asym.study import room_for

        if not (hint := room_for(type(error).__name__, str(error))):
            raise
        print(f"{' '.join(str(error).split())[:300]}\n{hint}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from asym.study import NotebookError, run_study  # here, so that `score` starts fast

    try:
        run_study(args.params, args.only, dict(args.set))
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _bench(args: argparse.Namespace) -> int:
    p = Params.load(args.params)
    missing = [name for name in ("gcol", "networkx", "reasoning_gym") if not importlib.util.find_spec(name)]
    if missing:
        install = ".venv/bin/pip install -c constraints.txt -e .[test,bench]"
        raise ParamsError(f"bench: {', '.join(missing)} not installed: {install}")
    from asym import figures, trends
    from asym.base import train_base
    from asym.bench import bench
    from asym.growth import growth
    from asym.readme import write_readmes
    from asym.runs import manifest, repo_root, results_dir, write_csv, write_json
    from asym.start import train_start

    out, began = results_dir("bench"), time.monotonic()
    start = train_start(p, train_base(p), "sudoku", p.seeds[0])
    table = bench(p, start, args.rounds)
    write_csv(out / "bench.csv", table)
    write_csv(out / "growth.csv", grown := growth(p, start, args.rounds))
    figures.style()
    figures.save(trends.cost_growth(grown), out / "figures" / "cost_growth")
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    about = manifest(p.model_dump(), time.monotonic() - began, files)
    write_json(out / "manifest.json", {"study": "bench", "complete": True} | about)
    write_readmes(repo_root())
    print(table.to_string(index=False, na_rep=""))
    return 0


def _plan(args: argparse.Namespace) -> int:
    studies = [Params.load(path, dict(args.set)) for path in args.params]
    from asym.plan import plan, summary

    if args.measure:
        return _measure(studies, args.write)
    if args.write:
        from asym.readme import write_readmes
        from asym.runs import repo_root, write_csv

        table = summary(studies)
        write_csv(repo_root() / "results" / "plan" / "plan.csv", table)
        write_readmes(repo_root())
        print(table.to_string(index=False))
        return 0
    for p in studies:
        table = plan(p)
        table["value"] = table["value"].map("{:,.4g}".format)
        print(p.study, table.to_string(index=False), sep="\n")
    return 0


def _measure(studies: list[Params], write: bool) -> int:
    import pandas as pd

    from asym.readme import write_readmes
    from asym.runs import repo_root, write_csv
    from asym.trial import trial

    tables = []
    for p in studies:
        tables.append(trial(p))
        print(tables[-1].to_string(index=False, na_rep="", float_format="{:,.4g}".format))
    if write:
        write_csv(repo_root() / "results" / "plan" / "measured.csv", pd.concat(tables, ignore_index=True))
        write_readmes(repo_root())
    return 0


def _train(args: argparse.Namespace) -> int:
    p = Params.load(args.params, dict(args.set))
    from accelerate import PartialState

    from asym import rl, sft
    from asym.base import train_base
    from asym.start import train_start
    from asym.study import check

    if args.arm not in (known := [*sft.arms(p), *rl.arms(p)]):
        raise ParamsError(f"arm {args.arm!r}: {args.params} has the arms {', '.join(known)}")
    check(p)
    if "RANK" in os.environ:  # others of the launch may have to wait as long as another study trains the same arm
        PartialState(timeout=timedelta(days=2))
    for task, seed in itertools.product(p.tasks, p.seeds):
        supervised = args.arm in sft.arms(p)
        base = None if p.start_model and not supervised else train_base(p)
        if supervised:
            run = sft.train_arm(p, base, task, args.arm, seed)
        else:
            run = rl.train_arm(p, train_start(p, base, task, seed), task, args.arm, seed)
        if first():
            print(run.checkpoint)
    return 0


def _screen(args: argparse.Namespace) -> int:
    given = {"start_model": json.dumps(str(Path(args.model).resolve())), "tasks": json.dumps([args.task])}
    p = Params.load(args.params, dict(args.set) | given)
    from asym.screen import screen
    from asym.start import train_start

    table = screen(p, train_start(p, None, args.task, p.seeds[0]), args.task)
    print(table.drop(columns=["family", "seeds"]).round(3).to_string(index=False, na_rep=""))
    return 0


def _pack(args: argparse.Namespace) -> int:
    from asym.archive import pack
    from asym.runs import repo_root

    print(f"{pack(repo_root(), Path(args.file))} finished runs in {args.file}")
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from asym.archive import unpack
    from asym.runs import repo_root, runs_dir

    print(f"{unpack(repo_root(), Path(args.file))} new runs in {runs_dir(repo_root())}")
    return 0


def _export(args: argparse.Namespace) -> int:
    p = Params.load(args.params, dict(args.set))
    from asym.data import export

    for folder in export(p, Path(args.to)):
        print(folder)
    return 0


def _claims(args: argparse.Namespace) -> int:
    from asym import figures, forest
    from asym.claims import recompute
    from asym.readme import write_readmes
    from asym.runs import repo_root, write_csv
    from asym.study import renew_manifest

    results = Path(args.results).resolve()
    table = recompute(results)
    write_csv(results / "tables" / "claims.csv", table)
    figure = results / "figures" / "claims_forest"
    if figure.with_suffix(".svg").exists():
        figures.style()
        figures.save(forest.claims_forest(table), figure)
    renew_manifest(results)
    write_readmes(repo_root())
    print(table.drop(columns=["family", "paper"]).round(2).to_string(index=False, na_rep=""))
    return 0


def _score(args: argparse.Namespace) -> int:
    from asym.tasks import get_task

    task, broken = get_task(args.task), False
    for row in score_lines(task, sys.stdin.buffer):
        broken |= "error" in row
        print(json.dumps(row))
    return int(broken)


def score_lines(task: Any, lines: Iterable[bytes]) -> Iterator[dict]:
    """One dict per line that is not blank: the scores, or {"line": number from 1, "error": what is wrong with it}."""
    from asym.scoring import score

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict) or not {"ground_truth", "completion"} <= row.keys():
                raise ValueError('must be an object with "ground_truth" and "completion"')
            if not isinstance(row["completion"], str):
                raise ValueError('"completion" must be a string')
            problem = task.problem(row["ground_truth"])
        except RecursionError:
            yield {"line": number, "error": "nested too deeply"}
        except ValueError as error:
            yield {"line": number, "error": str(error)}
        else:
            yield asdict(score(task, problem, row["completion"]))


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be key=value")
    return key.strip(), value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m asym", description=__doc__, formatter_class=_Verbatim)
    commands = parser.add_subparsers(required=True, metavar="{run,plan,train,screen,runs,data,bench,score,claims}")

    run = commands.add_parser("run", help="run a study", description=_RUN, epilog=_keys(), formatter_class=_Verbatim)
    run.add_argument("params", help="parameter file of the study, such as params/smoke.yaml")
    run.add_argument("--only", nargs="+", metavar="NN", help="only the notebooks whose names start so, such as 03 04")
    _add_set(run, "'lambdas=[0.1,0.5]'")
    run.set_defaults(command=_run)

    plan = commands.add_parser("plan", help="what a study will need", description=_PLAN, formatter_class=_Verbatim)
    plan.add_argument("params", nargs="+", help="parameter files of studies")
    plan.add_argument(
        "--write",
        action="store_true",
        help="also into results/plan and the README; without --measure a line for each study",
    )
    plan.add_argument("--measure", action="store_true", help="run a few steps here instead, with random weights")
    _add_set(plan, "lora_rank=16 sft_batch=4")
    plan.set_defaults(command=_plan)

    train = commands.add_parser(
        "train", help="train one arm, on several GPUs too", description=_TRAIN, formatter_class=_Verbatim
    )
    train.add_argument("arm", help="an SFT or RL arm of the study, such as ngdiff or alpha_0.5")
    train.add_argument("params", help="parameter file of the study, such as params/cpu.yaml")
    _add_set(train, "'tasks=[sudoku]' 'seeds=[0]'")
    train.set_defaults(command=_train)

    screen = commands.add_parser(
        "screen", help="rank label-free rewards", description=_SCREEN, formatter_class=_Verbatim
    )
    screen.add_argument("params", nargs="?", default="params/cpu.yaml", help="problems, drawings and limits are its")
    screen.add_argument("--model", required=True, help="folder of a checkpoint that answers in the study's format")
    screen.add_argument("--task", required=True, choices=get_args(Task))
    _add_set(screen, "n_coupling=100 coupling_rollouts=16")
    screen.set_defaults(command=_screen)

    runs = commands.add_parser("runs", help="carry finished runs elsewhere")
    ways = runs.add_subparsers(required=True, metavar="{pack,unpack}")
    for name, command, does in (("pack", _pack, "write runs to a file"), ("unpack", _unpack, "add the runs of a file")):
        way = ways.add_parser(name, help=does, description=_RUNS, formatter_class=_Verbatim)
        way.add_argument("file", help="such as results/cpu_seeds/runs.zip")
        way.set_defaults(command=command)

    data = commands.add_parser("data", help="write data in the published schema")
    export = data.add_subparsers(required=True, metavar="{export}").add_parser(
        "export", help="write a study's splits", description=_EXPORT, formatter_class=_Verbatim
    )
    export.add_argument("params", help="parameter file of the study, such as params/cpu.yaml")
    export.add_argument("--to", required=True, metavar="FOLDER", help="a folder in it per task, each a data set")
    _add_set(export, "n_train_sft=100 'seeds=[1]'")
    export.set_defaults(command=_export)

    bench = commands.add_parser(
        "bench", help="measure speed beside the stock trainers", description=_BENCH, formatter_class=_Verbatim
    )
    bench.add_argument("params", nargs="?", default="params/cpu.yaml", help="sizes and starting checkpoint are its")
    bench.add_argument("--rounds", type=_positive, default=3, help="of each pair, after one that does not count (3)")
    bench.set_defaults(command=_bench)

    score = commands.add_parser("score", help="score responses", description=_SCORE, formatter_class=_Verbatim)
    score.add_argument("--task", required=True, choices=get_args(Task))
    score.set_defaults(command=_score)

    claims = commands.add_parser("claims", help="recompute a study's claims", description=_CLAIMS)
    claims.add_argument("results", help="results folder of the study, such as results/cpu_seeds")
    claims.set_defaults(command=_claims)
    return parser


def _add_set(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", nargs="+", action="extend", type=_assignment, default=[], metavar="key=value",
        help=f"replace parameters of the file; values as in YAML, such as {example}",
    )  # fmt: skip


_Verbatim = argparse.RawDescriptionHelpFormatter
_RUN = """\
Execute the notebooks in order with the parameters of a file and write results/<study>/.
Finished arms in runs/ are reused: repeating an interrupted run resumes it."""
_PLAN = """\
Print what a study will need before any of it: parameters, tokens, memory, work, and a time on some GPUs. All of it is
arithmetic on parameters and model sizes; the column `how` says how, and what is assumed. Nothing is loaded.

With --measure a few steps of SFT, of RL and of writing run on the GPU at hand, their memory beside what is planned.
Weights are random, in the model's sizes, and responses as long as they may be: no weights are downloaded."""
_TRAIN = """\
Train one arm on each task and seed of a study, and what it starts from, as far as `runs/` has not got it; prints the
checkpoints. The notebooks find it there. On several GPUs:

  accelerate launch --num_processes 8 -m asym train ngdiff params/cpu.yaml
  accelerate launch --config_file params/accelerate/fsdp.yaml -m asym train token_averaged params/cpu.yaml

Batches are shared out, so that the parameters mean the same on any number of processes. NGDiff and the other balances
that weigh gradients need DDP: FSDP and DeepSpeed keep gradients in parts. Sharding on several GPUs is not tested."""
_SCREEN = """\
Sample rollouts of a checkpoint on RL training problems, score them with every label-free perception reward, and
print how well each follows true perception: r with its 95 % interval, pooled over rollouts and within prompt groups,
for exact and graded perception, and its rank. A reward that does not vary has no r."""
_RUNS = """\
`pack` writes all finished runs of `runs/` to a zip file, without data and without weights but those that further arms
start from.
`unpack` adds those that are not finished here. A study whose runs are unpacked shows its results in seconds; with
more seeds or arms in its file, only what is new is trained."""
_EXPORT = """\
Write the splits of a study as data sets with the published columns (query, image, ground_truth, response) and a card,
one folder per task: `datasets.load_dataset(FOLDER/sudoku)` reads it, and so does a study with `data: FOLDER/sudoku`."""
_BENCH = """\
Measure training, rollouts, evaluation and data synthesis beside what one would otherwise run, in turns,
print the table and write results/bench. Needs an idle machine, the extra [bench], and a quarter of an hour; more
if runs/ does not hold the checkpoint that RL starts from, which is then trained."""
_SCORE = """\
Score responses from standard input, one JSON object per line:

  {"ground_truth": ..., "completion": "the response's text"}

ground_truth is the published column, as JSON or as JSON text. sudoku: the rows of the puzzle, 0 for a blank;
graph_coloring: {"v": vertices, "c": colours, "edges": [[0, 1], ...]}.

Prints one JSON object per line read: a (answer correct), a_p (perception exact), a_p_graded (perception in part),
a_own (answer solves the problem as the response states it), each 0 to 1, and parse_failure (the reason, or "").
A broken line gives {"line": its number, "error": the reason}; the rest is still scored, the exit code is 1."""

_CLAIMS = """\
Recompute every claim of a study from the rows and tables in its results folder alone, write its claims.csv, draw their
figure anew where there is one, and print them. Nothing is trained or sampled."""


def _keys() -> str:
    rows = [(f"{key}={json.dumps(field.default)}", field.description) for key, field in Params.model_fields.items()]
    return "parameters and their defaults:\n" + "\n".join(f"  {left:<40} {right}" for left, right in rows)


if __name__ == "__main__":
    sys.exit(main())
