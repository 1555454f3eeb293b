"""All parameters of a study: one strict, flat, frozen model whose defaults are the smoke study.

A study is a flat YAML file of these keys (`Params.load`) or the parameters cell of a notebook (`Params.from_notebook`).
Both are checked completely before anything is computed; what is wrong is told at once, one line per problem.
"""

import ast
import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator


class ParamsError(ValueError):
    """What was asked for cannot be run; one line per problem, each naming where, key, value and what is allowed."""


def digest(value: Any) -> str:
    """First 10 hex digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _number(value: Any) -> Any:
    """PyYAML, and so papermill, reads `1e-5` as text: make it the number it looks like."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
PositiveShare = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1)]
Task = Literal["sudoku", "graph_coloring"]
Verbosity = Annotated[int, Field(ge=0, le=64)]
Baseline = Literal["uncertainty", "pcgrad", "perception_first"]
Part = Literal["language", "projector", "vision"]
Surrogate = Literal[
    "self_blindfold", "solver_blindfold", "validity", "group_agreement", "image_dependence", "answer_consistency"
]

WEIGHT = r"(0|1|0\.\d*[1-9])"  # as names of arms end in
CREDITS = rf"span_routed|routed_perception|reweighted_{WEIGHT}"  # RL arms that differ in who gets the credit


class Params(BaseModel):
    """The parameters of one study. Lengths are in pixels where so named, steps are optimizer steps."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)

    # Study
    study: str = Field("smoke", description="name of the study and of its folder in results/")
    seeds: list[Natural] = Field([0], min_length=1, description="seeds of post-training")
    base_seed: Natural = Field(0, description="seed of the base, which all seeds of post-training share")
    tasks: list[Task] = Field(["sudoku", "graph_coloring"], min_length=1, description="puzzles to study")
    family: Literal["qwen3_vl", "internvl"] = Field("qwen3_vl", description="model architecture")
    threads: Count = Field(2, description="CPU threads of torch for one arm; the base has those of all workers")
    workers: Count = Field(1, description="arms trained or measured side by side, each in a process of its own")
    join: list[str] = Field([], description="studies of other seeds or arms, else alike, whose stored rows join in")

    # Puzzles and drawings
    vertices_min: int = Field(5, ge=2, le=12, description="graph coloring: fewest vertices")
    vertices_max: int = Field(6, ge=2, le=12, description="graph coloring: most vertices")
    sudoku_size: Literal[4, 9] = Field(4, description="sudoku: cells per side")
    blanks_min: Count = Field(5, description="sudoku: fewest blank cells")
    blanks_max: Count = Field(8, description="sudoku: most blank cells")
    image_size: int = Field(64, ge=16, description="width and height of a drawing in pixels")
    difficulty_sudoku: Share = Field(0.5, description="how hard sudoku drawings are to read, 0 clean to 1")
    difficulty_graph_coloring: Share = Field(0.5, description="how hard graph drawings are to read, 0 clean to 1")

    # Text
    prompt_style: Literal["brief", "full"] = Field("brief", description="prompt of a few words, or with the rules")
    verbosity: Verbosity = Field(1, description="rounds in which the reasoning verifies its solution")
    variation: Share = Field(1.0, description="how unpredictable the reasoning is at equal length, 0 one fixed trace")

    # Splits (problems per task)
    data: str = Field(
        "generated", description="where problems come from: generated, hub:<owner>/<dataset>, or a folder like it"
    )
    n_train_base: Count = Field(64, description="problems for the base's two stages")
    n_train_sft: Count = Field(64, description="problems for SFT")
    n_train_rl: Count = Field(32, description="problems for RL")
    n_validation: Count = Field(16, description="problems for choosing")
    n_test: Count = Field(16, description="problems for reporting")

    # Model: a released one, or a small one of this size
    model: str = Field("", description="hub id or folder of a released model to post-train; '' makes a small one")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number format of weights and products; training all weights in bfloat16 loses small steps",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="kernel of attention")
    hidden_size: Count = Field(64, description="width of the language model, a multiple of heads")
    layers: Count = Field(2, description="layers of the language model")
    heads: Count = Field(2, description="attention heads of either model")
    vision_hidden_size: Count = Field(32, description="width of the vision model, a multiple of heads")
    vision_layers: Count = Field(2, description="layers of the vision model")
    patch_size: Count = Field(8, description="side of a patch in pixels; 2 x 2 patches make one image token")

    # Base: language stage, then vision stage
    language_steps: Natural = Field(4, description="steps of the language stage; 0 leaves it out")
    language_lr: Rate = Field(1e-3, description="learning rate of the language stage")
    language_batch: Count = Field(16, description="texts per step of the language stage")
    vision_steps: Natural = Field(4, description="steps of the vision stage; 0 leaves it out")
    vision_lr: Rate = Field(1e-3, description="learning rate of the vision stage")
    vision_batch: Count = Field(16, description="drawings per step of the vision stage")

    # Post-training
    trained_parts: list[Part] = Field(
        ["language", "projector", "vision"], min_length=1, description="parts of the model that SFT and RL train"
    )

    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    lora_rank: Natural = Field(0, description="rank of LoRA; 0 trains all weights")

    # SFT
    sft_steps: Count = Field(4, description="steps of every SFT arm")
    sft_lr: Rate = Field(1e-3, description="learning rate of SFT")
    sft_batch: Count = Field(8, description="responses per forward pass of SFT")
    sft_accumulation: Count = Field(1, description="forward passes per step of SFT")
    lambdas: list[Share] = Field(
        [0.5],
        description="weights of perception's loss, an SFT arm each; for C5 all above its share of the tokens",
    )
    balances: list[Baseline] = Field(
        ["uncertainty", "pcgrad", "perception_first"], description="further SFT arms: how others balance losses"
    )
    curve_every: Natural = Field(2, description="SFT steps from one measurement of accuracy to the next; 0 for none")
    long_steps: Natural = Field(6, description="SFT steps of one longer token-averaged run a task; 0 for none")

    # Dose and response: SFT again at other levels of one knob, the others left alone; [] leaves an axis out
    dose_verbosity: list[Verbosity] = Field([0, 2], description="levels of verbosity")
    dose_variation: list[Share] = Field([], description="levels of variation")
    dose_difficulty: list[Share] = Field([], description="levels of the drawings' difficulty")

    # RL
    start_model: str = Field(
        "", description="folder of a checkpoint of your own that RL starts from; '' for an SFT arm"
    )
    rl_start_arm: str = Field("lambda_0.5", description="SFT arm that RL starts from")
    rl_start_verbosity: Verbosity = Field(1, description="its `verbosity`: short traces make for more rollouts")
    rl_start_variation: Share = Field(1.0, description="its `variation`: free wording is noise in a policy gradient")
    rl_start_steps: Natural = Field(4, description="SFT steps of that checkpoint; 0: the fewest that keep a rule")
    rl_steps: Count = Field(2, description="steps of every RL arm")
    rl_curve_every: Natural = Field(1, description="RL steps from one measurement of accuracy to the next; 0 for none")
    rl_lr: Rate = Field(1e-4, description="learning rate of RL")
    rl_prompts: Count = Field(4, description="prompts per step of RL")
    rl_group: int = Field(4, ge=2, description="rollouts per prompt of RL")
    rl_accumulation: Count = Field(
        1, description="forward passes per step of RL, of all processes; must divide its rollouts"
    )
    rl_temperature: Rate = Field(1.0, description="sampling temperature of RL")
    rl_beta: NonNegative = Field(0.0, description="weight of the KL penalty")
    vllm: bool = Field(False, description="rollouts by vLLM, which must be installed, in the training process")
    alphas: list[PositiveShare] = Field([0.5], description="weights of a_p in the reward, an RL arm each")
    graded_alphas: list[PositiveShare] = Field([], description="the same with graded a_p")
    surrogates: list[Surrogate] = Field(
        ["solver_blindfold"], min_length=1, description="label-free perception rewards, an RL arm each"
    )
    surrogate_alpha: PositiveShare = Field(0.5, description="weight of the surrogate in its RL arm")
    credits: list[str] = Field([], description="RL arms span_routed, routed_perception, reweighted_λ: who is credited")

    # Measuring
    max_new_tokens: Count = Field(64, description="longest response in tokens")
    n_coupling: Count = Field(8, description="problems for measuring reward coupling")
    coupling_rollouts: int = Field(4, ge=2, description="rollouts per problem for measuring reward coupling")
    n_gradient: Natural = Field(4, description="of these, problems whose policy gradients are compared; 0 for none")
    eval_batch: Count = Field(256, description="responses generated at once; if it changes, what is finished is kept")
    bootstrap: Count = Field(1000, description="bootstrap resamples of an interval")

    # Checks across keys look only at keys declared above them that are themselves valid, and so never hide one another.

    @field_validator("study")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
            raise ValueError("must be a folder name of letters, digits, '_', '-' and '.'")
        if value in ("bench", "plan"):  # in results/, but no studies
            raise ValueError("must be another name: the commands bench and plan write to that folder")
        return value

    @field_validator(
        "seeds",
        "trained_parts",
        "tasks",
        "lambdas",
        "balances",
        "dose_verbosity",
        "dose_variation",
        "dose_difficulty",
        "alphas",
        "graded_alphas",
        "surrogates",
        "credits",
    )
    @classmethod
    def _distinct(cls, value: list) -> list:
        if len({f"{item:g}" if isinstance(item, float) else item for item in value}) < len(value):
            raise ValueError("must not name the same value twice")
        return value

    @field_validator("trained_parts")
    @classmethod
    def _in_one_order(cls, value: list) -> list:
        return sorted(value)  # the same parts are the same training

    @field_validator("lambdas", "alphas", "graded_alphas")
    @classmethod
    def _nameable(cls, value: list[float]) -> list[float]:
        if any(round(item, 4) != item for item in value):
            raise ValueError("must have at most four decimals, for they name the arms")
        return value

    @field_validator("vertices_max", "blanks_max")
    @classmethod
    def _not_below_minimum(cls, value: int, info: ValidationInfo) -> int:
        minimum = info.field_name.replace("max", "min")
        if value < info.data.get(minimum, value):
            raise ValueError(f"must be at least {minimum} = {info.data[minimum]}")
        return value

    @field_validator("blanks_max")
    @classmethod
    def _leaves_enough_givens(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("sudoku_size", 9)
        most = {4: 12, 9: 45}[size]  # with more, random blanks hardly ever leave one solution
        if value > most:
            raise ValueError(f"must be at most {most} for sudoku_size = {size}")
        return value

    @field_validator("data")
    @classmethod
    def _holds_one_task(cls, value: str, info: ValidationInfo) -> str:
        if value != "generated" and len(info.data.get("tasks", [""])) > 1:
            raise ValueError("must be generated where tasks has several: a data set holds one of them")
        return value

    @field_validator("heads")
    @classmethod
    def _divides_width(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("hidden_size", 0) % (2 * value):  # positions turn pairs of numbers
            raise ValueError(f"twice its value must divide hidden_size = {info.data['hidden_size']}")
        return value

    @field_validator("vision_hidden_size")
    @classmethod
    def _divided_by_heads(cls, value: int, info: ValidationInfo) -> int:
        pairs = 4 if info.data.get("family") == "qwen3_vl" else 1  # along height and width
        if value % (pairs * info.data.get("heads", 1)):
            times = f"{pairs} times " * (pairs > 1)
            raise ValueError(f"must be a multiple of {times}heads = {info.data['heads']}")
        return value

    @field_validator("patch_size")
    @classmethod
    def _tiles_image(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("image_size", 0) % (2 * value):
            raise ValueError(f"twice its value must divide image_size = {info.data['image_size']}")
        return value

    @field_validator("rl_prompts")
    @classmethod
    def _has_enough_problems(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("n_train_rl", value):
            raise ValueError(
                f"must be at most n_train_rl = {info.data['n_train_rl']}, for a step takes them all at once"
            )
        return value

    @field_validator("rl_accumulation")
    @classmethod
    def _divides_rollouts(cls, value: int, info: ValidationInfo) -> int:
        rollouts = info.data.get("rl_prompts", 0) * info.data.get("rl_group", 0)
        if rollouts % value:
            raise ValueError(f"must divide the {rollouts} rollouts of a step, rl_prompts times rl_group")
        return value

    @field_validator("rl_start_arm")
    @classmethod
    def _sft_arm(cls, value: str) -> str:
        if not re.fullmatch(rf"token_averaged|ngdiff|lambda_{WEIGHT}", value):
            raise ValueError("must be token_averaged, ngdiff or lambda_ with a number from 0 to 1, such as lambda_0.5")
        return value

    @field_validator("credits")
    @classmethod
    def _credit_arms(cls, value: list[str]) -> list[str]:
        if not all(re.fullmatch(CREDITS, arm) for arm in value):
            known = "span_routed, routed_perception, or reweighted_ with a number from 0 to 1, such as reweighted_0.5"
            raise ValueError(f"must hold {known}")
        return value

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, str] | None = None) -> Self:
        """Read a YAML file; `overrides` (`--set key=value`, values in YAML) replace its keys.

        Raises ParamsError for a missing or unreadable file and for every key that is unknown, double or out of range.
        """
        values, problems = _read_yaml(Path(path))
        source = dict.fromkeys(values, str(path))
        for key, text in (overrides or {}).items():
            source[key] = "--set"
            try:
                values[key] = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError, RecursionError):
                values[key] = text  # the model tells what it wants instead
        return cls._checked(values, source, str(path), problems)

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Self:
        """Take every name of `namespace` (a notebook's `globals()`) that is a parameter; the rest stay at defaults.

        Raises ParamsError, also for a name that papermill injected and that is no parameter.
        """
        injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
        assigned = [node for cell in injected for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
        names = dict.fromkeys([*cls.model_fields, *(target.id for node in assigned for target in node.targets)])
        return cls._checked({name: namespace[name] for name in names if name in namespace}, {}, "notebook", [])

    def digest(self, *fields: str) -> str:
        """`digest` of the named fields, or of all."""
        return digest({name: getattr(self, name) for name in fields or type(self).model_fields})

    @classmethod
    def _checked(cls, values: dict, source: dict, otherwise: str, problems: list[str]) -> Self:
        try:
            params = cls.model_validate(values)
        except ValidationError as error:
            for e in error.errors(include_url=False):
                key, *items = e["loc"]
                name = key + "".join(f"[{i}]" for i in items)
                problems.append(f"{source.get(key, otherwise)}: {name} = {_short(e['input'])}: {_why(key, e)}")
        if problems:
            raise ParamsError("\n".join(problems))
        return params


def _why(key: str, error: dict) -> str:
    """What is allowed instead, in words."""
    if error["type"] == "extra_forbidden":
        names = list(Params.model_fields)
        close = difflib.get_close_matches(key, names, n=1) or [name for name in names if key in name]
        known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"
        return f"unknown parameter, {known}"
    message = re.sub(r"^Value error, |^(Input|List) should(?= )", lambda m: "must" if m[1] else "", error["msg"])
    return f"{message.removesuffix(' after validation, not 0')} ({Params.model_fields[key].description})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping in a YAML file and, as problems, its double keys (which YAML readers let pass in silence)."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: must hold lines of `key: value`, holds {_short(values)}")
    keys = [key.value for key, _ in node.value]
    double = sorted({key for key in keys if keys.count(key) > 1})
    problems = [f"{path}: {key}: is there {keys.count(key)} times, allowed is once" for key in double]
    return {str(key): value for key, value in values.items()}, problems
