"""What a study will need: parameters, memory, tokens, FLOPs and a time, computed from its parameters before any of it.

Everything is arithmetic on the model's configuration; nothing is loaded. What is an assumption is called so in the
column `how`. Left out: the vision tower's activations, the allocator's waste, evaluation's share of idle time, the
base of a small model, dose and response.
"""

import re
from itertools import islice
from statistics import fmean

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from asym import models, rl, sft
from asym.base import vocabulary
from asym.data import problems, stream, task_of
from asym.params import Params
from asym.transcript import compose

# Sizes of the released models, from their config.json on the hub: language width, MLP, layers, heads, tied embeddings;
# of the vision tower width, MLP, layers, patch. So a plan needs no network.
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
RELEASED = {
    "Qwen/Qwen3-VL-2B-Instruct": ((2048, 6144, 28, 16, True), (1024, 4096, 24, 16)),
    "Qwen/Qwen3-VL-4B-Instruct": ((2560, 9728, 36, 32, True), (1024, 4096, 24, 16)),
    "Qwen/Qwen3-VL-8B-Instruct": ((4096, 12288, 36, 32, False), (1152, 4304, 27, 16)),
    "OpenGVLab/InternVL3_5-2B-HF": ((2048, 6144, 28, 16, False), (1024, 4096, 24, 14)),
    "OpenGVLab/InternVL3_5-4B-HF": ((2560, 9728, 36, 32, False), (1024, 4096, 24, 14)),
    "OpenGVLab/InternVL3_5-8B-HF": ((4096, 12288, 36, 32, False), (1024, 4096, 24, 14)),
}
INTERNVL_TILE = 448  # pixels; an image no larger is one tile
CARDS = {  # memory in GB, peak of bfloat16 products in TFLOP/s (vendor's figure, dense)
    "1 x 24 GB (RTX 4090)": (24, 165, 1),
    "1 x 80 GB (A100)": (80, 312, 1),
    "8 x 80 GB (A100)": (80, 312, 8),
}
PAPERS_SHARE = 0.025  # of the tokens of a response are perception (arXiv 2605.29496)
REACHED = 0.3  # of that peak, assumed
WIDTHS = 34  # bytes of activations per token, layer and unit of width in 16 bits (Korthikanti et al., arXiv 2205.05198)
GB = 1e9


def config_of(p: Params) -> PretrainedConfig:
    """The configuration of the model of a study. Raises ParamsError if it is neither known, here, nor on the hub."""
    if not p.model:
        return models.build_model(models.build_processor(vocabulary(p, p.seeds[0]), p), p, 0).config
    if p.model not in RELEASED:
        return models.config(p.model)
    (width, mlp, layers, heads, tied), (eye, eye_mlp, eye_layers, patch) = RELEASED[p.model]
    text = QWEN3 | {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "tie_word_embeddings": tied}
    vision = {"hidden_size": eye, "intermediate_size": eye_mlp, "patch_size": patch}
    if "InternVL" in p.model:
        vision |= {"num_hidden_layers": eye_layers, "num_attention_heads": 16, "image_size": INTERNVL_TILE}
        text |= {"model_type": "qwen3"}
        return AutoConfig.for_model("internvl", text_config=text, vision_config=vision, tie_word_embeddings=tied)
    vision |= {"depth": eye_layers, "num_heads": 16, "out_hidden_size": width, "num_position_embeddings": 2304}
    vision |= {"deepstack_visual_indexes": [5, 11, 17] if eye_layers == 24 else [8, 16, 24]}
    return AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied)


def parameters(config: PretrainedConfig, p: Params) -> pd.Series:
    """Numbers of parameters: language, projector, vision, embeddings (a part of language), and trained."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = dict.fromkeys(("language", "projector", "vision", "embeddings", "trained"), 0)
    for name, weights in model.named_parameters():
        count[models.part_of(name)] += weights.numel()
        count["embeddings"] += weights.numel() * ("embed_tokens" in name)
    lora = models.prepare_training(model, p)
    for name, module in model.named_modules():
        if lora and name in lora.target_modules:
            count["trained"] += p.lora_rank * (module.in_features + module.out_features)
    if not lora:
        count["trained"] = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    return pd.Series(count)


def lengths(config: PretrainedConfig, p: Params, samples: int = 64) -> pd.Series:
    """Mean tokens of an image, of the text of a prompt and of a response, and the patches behind the image's tokens."""
    vision = config.vision_config
    if config.model_type == "internvl":
        side = max(config.vision_config.image_size) // max(vision.patch_size)
        patches, image = side**2, round(side * config.downsample_ratio) ** 2
    else:
        side = max(1, round(p.image_size / vision.patch_size / vision.spatial_merge_size))
        image, patches = side**2, (side * vision.spatial_merge_size) ** 2
    prompts, perceptions, responses = [], [], []
    for name in p.tasks:
        task = task_of(p, name)
        for index, problem in enumerate(islice(problems(task, "train_sft", 0), samples)):
            trace = task.explain(problem, stream(0, name, index), p.verbosity, p.variation)
            prompts.append(task.prompt(problem, "full" if p.model else p.prompt_style))
            perceptions.append(task.transcribe(problem))
            responses.append(compose(task.transcribe(problem), *trace))
    count = lambda texts: fmean(len(_PIECES.findall(text)) for text in texts)  # noqa: E731
    response = count(responses)
    if p.data != "generated":  # published responses are longer than ours: the paper gives perception's share of them
        response = min(count(perceptions) / PAPERS_SHARE, p.max_new_tokens)
    found = {"image": image, "patches": patches, "prompt": count(prompts), "response": response}
    return pd.Series(found)


_PIECES = re.compile(r" ?[^\W\d]+|\d|[^\w\s]+\s*|\s+")  # about as a released tokenizer cuts text like ours


def plan(p: Params) -> pd.DataFrame:
    """What the study will need: columns quantity, value, unit, how."""
    config = config_of(p)
    text, n, length = config.get_text_config(), parameters(config, p), lengths(config, p)
    rl_length = lengths(config, rl.like_start(p))
    size = 2 if p.dtype == "bfloat16" else 4
    total = n.language + n.projector + n.vision
    body = n.language - n.embeddings * (not text.tie_word_embeddings)  # tied, the table is the output's projection, too
    kept = 4 if p.lora_rank else size  # adapters are kept in 32 bits
    context, rl_context = (each.image + each.prompt + each.response for each in (length, rl_length))
    limit = length.image + length.prompt + p.max_new_tokens
    width = WIDTHS * size / 2 * text.hidden_size
    held = width * text.num_hidden_layers
    if p.activation_checkpointing:  # the input of every layer, and one layer whole
        held = text.hidden_size * size * text.num_hidden_layers + width
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * size * limit
    memory = {
        "weights": (total * size, f"{size} bytes each"),
        "gradients": (2 * n.trained * kept, f"{kept} bytes for each trained weight, those of either segment"),
        "optimizer": (2 * n.trained * kept, "AdamW: two numbers for each trained weight, in its format"),
        "activations, SFT": (p.sft_batch * context * held, "34 bytes per token, layer and unit of width in 16 bits"),
        "keys and values, evaluation": (p.eval_batch * cache, "eval_batch responses of max_new_tokens at once"),
        "activations, RL": (
            p.rl_prompts
            * p.rl_group
            / p.rl_accumulation
            * (rl_context * held + 2 * 4 * rl_length.response * text.vocab_size),
            "as for SFT, and logits with their gradients in 32 bits",
        ),
        "keys and values, RL": (
            0 if p.vllm else p.rl_prompts * p.rl_group * cache,
            "vLLM's pool instead, a share of the card" if p.vllm else "all rollouts of a step at once",
        ),
    }
    sft_arms, rl_arms = len(sft.arms(p)), len(rl.arms(p))
    backward = (2 if p.lora_rank else 4) + 2 * p.activation_checkpointing
    look = 2 * n.vision * length.patches
    seen = p.sft_steps * p.sft_batch * p.sft_accumulation
    rollouts = p.rl_steps * p.rl_prompts * p.rl_group
    curves = sft_arms * (p.sft_steps // p.curve_every if p.curve_every else 0)
    curves += rl_arms * (p.rl_steps // p.rl_curve_every if p.rl_curve_every else 0)
    asked = 2 * (p.n_test * (sft_arms + rl_arms + 1) + p.n_validation * (1 + curves))
    asked += 2 * p.n_coupling * p.coupling_rollouts
    # A token multiplies with every weight, and in every layer with the keys and values of half the context on average
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim
    work, rl_work = ((body + attention * each) * each for each in (context, rl_context))
    flops = {
        "an SFT arm": seen * ((2 + backward) * work + look),
        "an RL arm": rollouts * ((2 + 2 + backward) * rl_work + 2 * look),
        "measuring": asked * (2 * work + look),
    }
    runs = len(p.tasks) * len(p.seeds)
    flops["the study"] = runs * (sft_arms * flops["an SFT arm"] + rl_arms * flops["an RL arm"] + flops["measuring"])
    rows = [("parameters: " + name, value / 1e6, "million", "counted") for name, value in n.items()]
    rows += [
        (f"tokens: {name}", value, "tokens", _HOW.get(name, "counted on samples, about"))
        for name, value in length.items()
    ]
    rows += [(f"memory: {name}", value / GB, "GB", how) for name, (value, how) in memory.items()]
    peak = _peak(memory, 1)
    rows.append(
        (
            "memory: most at once",
            peak / GB,
            "GB",
            "weights, and the most of training, rollouts and evaluation; on one card",
        )
    )
    rows += [
        (f"work: {name}", value / 1e15, "PFLOP", "2 per weight or key and token forward, 2 to 6 back")
        for name, value in flops.items()
    ]
    for card, (room, speed, count) in CARDS.items():
        hours = flops["the study"] / (speed * 1e12 * REACHED * count) / 3600
        fits = (
            "fits"
            if _peak(memory, count) < 0.9 * room * GB
            else "does not fit one card: lower the batches, checkpoint, use LoRA or FSDP"
        )
        rows.append((f"time: {card}", hours, "hours", f"not measured: at {REACHED:.0%} of the peak; {fits}"))
    return pd.DataFrame(rows, columns=["quantity", "value", "unit", "how"])


def summary(studies: list[Params]) -> pd.DataFrame:
    """One line per study: parameters (billion), trained (million), most memory (GB), hours for all of it by card."""
    rows = []
    for p in studies:
        value = plan(p).set_index("quantity")["value"]
        size = sum(value[f"parameters: {part}"] for part in ("language", "projector", "vision")) / 1000
        row = {
            "study": p.study,
            "parameters_1e9": round(size, 2),
            "trained_1e6": round(value["parameters: trained"], 1),
        }
        row["memory_gb"] = round(value["memory: most at once"], 1)
        rows.append(row | {f"hours, {card}": round(value[f"time: {card}"], 1) for card in CARDS})
    return pd.DataFrame(rows)


_HOW = {"image": "by the processor's rule", "patches": "by the processor's rule"}


def _peak(memory: dict[str, tuple[float, str]], cards: int) -> float:
    """Bytes on each of so many cards, which share batches and rollouts, not weights."""
    value = {name: size for name, (size, _) in memory.items()}
    trained = value["gradients"] + value["optimizer"]
    work = [value[kind] for kind in ("activations, SFT", "activations, RL", "keys and values, RL")]
    return value["weights"] + max(trained + max(work) / cards, value["keys and values, evaluation"])
