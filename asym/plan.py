"""What a study will need: parameters, tokens, memory, work, time and cost, computed before any of it.

Everything is arithmetic on the model's configuration: nothing is loaded, and nothing but `REACHED` has been measured
(`trial.py` measures). What is an assumption is called so, here and in the column `how`. Left out of memory: the vision
tower's activations, DDP's buckets, the allocator's waste. Left out of time: the encoding of prompts, the second pass of
SFT arms that weigh gradients, the gradients of notebooks 2 and 4, image_dependence in an RL arm, SFT for the coupling
across checkpoints, a longer SFT, dose and response, the base of a small model.
"""

import re
from itertools import islice
from math import ceil, isnan, nan
from statistics import fmean
from typing import NamedTuple

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from asym import models, rl, sft
from asym.base import vocabulary
from asym.data import problems, stream, task_of
from asym.params import Params
from asym.start import like_start, start_steps
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
QWEN_LEAST = 256  # pixels; a smaller image is enlarged


class Card(NamedTuple):
    """Cards of one kind: sizes and speeds from NVIDIA's data sheets, an assumed price."""

    memory: float  # GB
    speed: float  # TFLOP/s of products in bfloat16, dense
    bandwidth: float  # GB/s
    price: float  # US dollars an hour, of one
    count: int = 1


CONSUMER_PRICE, SERVER_PRICE = 0.5, 2.0  # assumptions; put your provider's in their place
SMALL, LARGE = "1 x 24 GB (RTX 4090)", "1 x 80 GB (A100)"
CARDS = {
    SMALL: Card(24, 165, 1008, CONSUMER_PRICE),
    LARGE: Card(80, 312, 2039, SERVER_PRICE),
    "8 x 80 GB (A100)": Card(80, 312, 2039, SERVER_PRICE, 8),
}
SPARING = {"eval_batch": 16, "max_new_tokens": 6656, "sft_batch": 4}  # at most, for a 2B model to fit the small card

PAPERS_SHARE = 0.025  # of the tokens of a response are perception (arXiv 2605.29496)
REACHED = 0.17  # of the data sheet's peak, in training: 0.15 to 0.19 of an H100's (989) in results/plan/measured.csv
STREAMED = 0.5  # of the bandwidth, in writing: assumed
# Seconds that Python takes for a decoder layer and token, however small the batch: assumed, after Qwen's 49.94 tokens/s
# of 24 layers on an A100 (https://qwen.readthedocs.io/en/v2.0/benchmark/speed_benchmark.html, transformers)
LAYER_STEP = 0.8e-3
ADAPTED = 2  # times that in rollouts: an adapter adds six kernels to each of a layer's seven products. Assumed
VLLM_SHARE = 0.3  # of a card, for vLLM's own weights, keys and values (TRL's default, in GRPOConfig)
WIDTHS = 34  # bytes of activations per token, layer and unit of width in 16 bits (Korthikanti et al., arXiv 2205.05198)
# Bytes per token and word of the vocabulary in `sft.token_losses`: log-likelihoods, their gradients and those of the
# logits, in 32 bits
SCORED = 12
PARTS = ("language", "projector", "vision")
USED = 0.9  # of a card's memory can be used: assumed
GB = 1e9


def config_of(p: Params) -> PretrainedConfig:
    """The configuration of the model of a study. Raises ParamsError if it is neither known, here, nor on the hub."""
    if not p.model:
        return models.build_model(models.build_processor(vocabulary(p, p.base_seed), p), p, 0).config
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
    """Numbers of parameters: language, projector, vision, embeddings (a part of language), and trained.

    Also "adapted": the numbers that go into and come out of the language part's adapters for one token.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = dict.fromkeys((*PARTS, "embeddings", "trained", "adapted"), 0)
    for name, weights in model.named_parameters():
        count[models.part_of(name)] += weights.numel()
        count["embeddings"] += weights.numel() * ("embed_tokens" in name)
    lora = models.prepare_training(model, p)
    for name, module in model.named_modules():
        if lora and name in lora.target_modules:
            ends = module.in_features + module.out_features
            count["trained"] += p.lora_rank * ends
            count["adapted"] += ends * (models.part_of(name) == "language")
    if not lora:
        count["trained"] = sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
    return pd.Series(count)


def lengths(config: PretrainedConfig, p: Params, samples: int = 32) -> pd.Series:
    """Mean tokens of an image, a prompt's text, a response and its perception, and the patches behind the image's."""
    vision = config.vision_config
    if config.model_type == "internvl":
        side = max(config.vision_config.image_size) // max(vision.patch_size)
        patches, image = side**2, round(side * config.downsample_ratio) ** 2
    else:
        pixels = max(p.image_size, QWEN_LEAST) if p.model in RELEASED else p.image_size
        side = max(1, round(pixels / vision.patch_size / vision.spatial_merge_size))
        image, patches = side**2, (side * vision.spatial_merge_size) ** 2
    prompts, perceptions, responses = [], [], []
    for name in p.tasks:
        task = task_of(p, name)
        for index, problem in enumerate(islice(problems(task, "train_sft", 0), samples)):
            trace = task.explain(problem, stream(0, name, index), p.verbosity, p.variation)
            prompts.append(task.prompt(problem, p.prompt_style if p.data == "generated" else "full"))
            perceptions.append(task.transcribe(problem))
            responses.append(compose(task.transcribe(problem), *trace))
    count = lambda texts: fmean(len(_PIECES.findall(text)) for text in texts)  # noqa: E731
    perception, response = count(perceptions), count(responses)
    if p.data != "generated":  # published responses are longer than ours: the paper gives perception's share of them
        response = min(perception / PAPERS_SHARE, p.max_new_tokens)
    found = {"image": image, "patches": patches, "prompt": count(prompts)}
    return pd.Series(found | {"perception": perception, "response": response})


_PIECES = re.compile(r" ?[^\W\d]+|\d|[^\w\s]+\s*|\s+")  # about as a released tokenizer cuts text like ours


class Sizes:
    """What memory and time of a study follow from. Raises ParamsError as `config_of` does."""

    def __init__(self, p: Params):
        config = config_of(p)
        text, size = config.get_text_config(), 2 if p.dtype == "bfloat16" else 4
        width = WIDTHS * size / 2 * text.hidden_size
        self.n = parameters(config, p)
        self.length = self.rl_length = lengths(config, p)
        if (start := like_start(p)) != p:
            self.rl_length = lengths(config, start)
        self.limit = self.length.image + self.length.prompt + p.max_new_tokens  # tokens
        self.layers, self.width = text.num_hidden_layers, text.hidden_size
        self.kept = self.n.trained * (4 if p.lora_rank else size)  # bytes of trained weights; adapters are in 32 bits
        self.weights = self.n[[*PARTS]].sum() * size + (self.kept if p.lora_rank else 0)  # bytes
        # Bytes per token: keys and values; logits outside of trainers; activations, which if recomputed are those of
        # one layer and the input of every other
        self.cache = 2 * self.layers * text.num_key_value_heads * text.head_dim * size
        self.scored = SCORED * text.vocab_size
        width += 4 * self.n.adapted / self.layers * (size == 2)  # adapters work in 32 bits: copies, if others do not
        self.held = width * self.layers
        if p.activation_checkpointing:
            self.held = text.hidden_size * size * self.layers + width
        # Products of a token: with weights (the table is the output's, too, if tied); with each token of its context,
        # of keys and of values, half of them on average
        self.products = self.n.language - self.n.embeddings * (not text.tie_word_embeddings)
        self.attention = self.layers * text.num_attention_heads * text.head_dim


RL = ("activations, RL", "keys and values, RL", "surrogates, RL")  # one after the other, as in measuring
MEASURING = ("keys and values, evaluation", "logits, screening", "one response with its gradients")


def memory(p: Params, s: Sizes, card: Card) -> dict[str, tuple[float, str]]:
    """Bytes on each card by what takes them, and how they are counted.

    Cards share batches and rollouts, not weights. Responses are as long as `max_new_tokens`: the longest decides.
    """
    rollouts, together = rollouts_on(p, card)
    of_a_pass = rollouts / max(1, p.rl_accumulation // card.count)
    written = s.limit * s.cache
    seen = (s.length.image + s.length.prompt + s.length.perception) * s.scored
    asking = {"self_blindfold": written, "image_dependence": seen}
    asked = min(p.eval_batch, rollouts) * max(asking.get(name, 0) for name in p.surrogates)
    words = f"{SCORED} bytes per token and word of the vocabulary"
    return {
        "weights": (s.weights, "in the number format of the study"),
        "gradients": (2 * s.kept, "of all trained weights, those of either segment"),
        "optimizer": (2 * s.kept, "AdamW: two numbers for each trained weight, in its format"),
        "activations, SFT": (
            max(1, p.sft_batch / card.count) * s.limit * s.held,
            f"{WIDTHS} bytes per token, layer and unit of width in 16 bits, adapters' inputs and outputs in 32; "
            "no logits: on a GPU TRL's fused head computes them tile by tile",
        ),
        "activations, RL": (max(1, of_a_pass) * s.limit * s.held, "as for SFT, of the rollouts of one pass"),
        "keys and values, RL": (0 if p.vllm else together * written, "eval_batch rollouts at once, in whole groups"),
        "surrogates, RL": (asked, "keys and values of self_blindfold, logits of image_dependence, if arms"),
        "vLLM's pool": (p.vllm * VLLM_SHARE * card.memory * GB, f"{VLLM_SHARE:.0%} of the card, TRL's default"),
        "keys and values, evaluation": (p.eval_batch * written, "eval_batch responses at once"),
        "logits, screening": (p.eval_batch * seen, f"image_dependence, up to the perception's end: {words}"),
        "one response with its gradients": (
            s.limit * (s.held + s.scored) + 3 * s.kept,
            f"notebooks 2, 4: activations, gradients and their sums; {words}",
        ),
    }


def rollouts_on(p: Params, card: Card) -> tuple[float, float]:
    """Rollouts of an RL step on each card, and how many of them are written together: whole groups, at least one."""
    rollouts = p.rl_prompts * p.rl_group / card.count
    return rollouts, max(p.rl_group, min(p.eval_batch // p.rl_group * p.rl_group, rollouts))


def most(held: dict[str, tuple[float, str]]) -> float:
    """Bytes at once on a card, at most, of what `memory` returns."""
    value = {name: size for name, (size, _) in held.items()}
    training = max(value["activations, SFT"], value["vLLM's pool"] + max(value[name] for name in RL))
    training += value["gradients"] + value["optimizer"]
    return value["weights"] + max(training, *(value[name] for name in MEASURING))


def work(p: Params, s: Sizes) -> dict[str, float]:
    """FLOPs of training an arm, without the writing of rollouts: 2 per weight or key and token forward."""
    look = 2 * s.n.vision * s.length.patches
    again = p.vllm + (p.rl_beta > 0)  # scored once more: vLLM rounds otherwise; a KL penalty compares

    def trained(length: pd.Series, again: int = 0) -> float:
        """Of a response: forward as often as asked, and back, where frozen weights have no gradient but keys have."""
        context, forward = (
            length.image + length.prompt + length.response,
            2 + 2 * p.activation_checkpointing + 2 * again,
        )
        weights = (forward + (2 if p.lora_rank else 4)) * s.products
        return (weights + (forward + 4) * s.attention * context) * context

    seen, rollouts = p.sft_steps * p.sft_batch * p.sft_accumulation, p.rl_steps * p.rl_prompts * p.rl_group
    return {
        "an SFT arm": seen * (trained(s.length) + look),
        "an RL arm": rollouts * (trained(s.rl_length, again) + (1 + again) * look),
    }


def writing(
    p: Params, s: Sizes, card: Card, length: pd.Series, responses: float, together: float, layer: float = LAYER_STEP
) -> float:
    """Hours in which one card writes so many responses of a mean `length`, so many of them together.

    A batch takes as many steps as its longest response, assumed to be one of `max_new_tokens`; the others leave it at
    the mean length. A step reads the weights and all keys and values there are, and lasts `layer` seconds or more for
    each layer.
    """
    tokens = length.response * (length.image + length.prompt + length.response / 2)  # read for one response, in all
    read = p.max_new_tokens * s.weights + together * tokens * s.cache
    batch = max(read / (card.bandwidth * GB * STREAMED), p.max_new_tokens * s.layers * layer)
    return ceil(responses / together) * batch / 3600


def rollout_hours(p: Params, s: Sizes, card: Card) -> tuple[float, float]:
    """Hours of an RL arm in which rollouts are written, and in which the policy answers for self_blindfold."""
    (rollouts, together), layer = rollouts_on(p, card), LAYER_STEP * (ADAPTED if p.lora_rank else 1)
    answers = writing(p, s, card, s.rl_length, rollouts, min(p.eval_batch, rollouts), layer)
    if p.vllm:  # as many as its pool holds, and no Python between two layers
        room = VLLM_SHARE * card.memory * GB - s.weights
        together, layer = max(1, min(rollouts, room // (s.limit * s.cache))), 0
    return p.rl_steps * writing(p, s, card, s.rl_length, rollouts, together, layer), p.rl_steps * answers


def hours(p: Params, s: Sizes, card: Card) -> dict[str, float]:
    """Hours of an SFT arm and of an RL arm, on all cards; of measuring them all, on one; and of the study.

    A study trains its arms and what RL starts from. It measures arms and what they start from on the test problems,
    snapshots on the validation problems, and rollouts of three checkpoints and of every RL arm. "paid" are the hours of
    all cards while they train, and of one while it measures.
    """
    sft_arms, rl_arms, runs = len(sft.arms(p)), len(rl.arms(p)), len(p.tasks) * len(p.seeds)
    an_hour = card.count * card.speed * 1e12 * REACHED * 3600  # FLOPs
    sft_arm, rl_arm = (flops / an_hour for flops in work(p, s).values())
    written, answered = rollout_hours(p, s, card)
    starts = [] if p.start_model else start_steps(p)  # all of them, as if none but the last would do
    trained = (sft_arms + sum(starts) / p.sft_steps) * sft_arm + rl_arms * (rl_arm + written)
    trained += ("self_blindfold" in p.surrogates) * answered
    snapshots = sft_arms * ceil(p.sft_steps / (p.curve_every or p.sft_steps))
    snapshots += rl_arms * ceil(p.rl_steps / p.rl_curve_every) if p.rl_curve_every else 0
    snapshots += len(starts) if len(starts) > 1 else 0
    asked = [
        (2 * (sft_arms + rl_arms + 2), p.n_test),
        (2 * (snapshots + 3), p.n_validation),  # and the base, also in its own four formats
        # And self_blindfold, of the start and of every RL arm
        (2 * (1 if p.start_model else 3) + 1 + 3 * rl_arms, p.n_coupling * p.coupling_rollouts),
    ]
    layer = LAYER_STEP * (ADAPTED if p.lora_rank else 1)
    measuring = runs * sum(k * writing(p, s, card, s.length, n, min(n, p.eval_batch), layer) for k, n in asked)
    found = {"an SFT arm": sft_arm, "an RL arm": rl_arm + written, "measuring": measuring}
    return found | {"the study": runs * trained + measuring, "paid": card.count * runs * trained + measuring}


def plan(p: Params) -> pd.DataFrame:
    """What the study will need: columns quantity, value, unit, how. A card that is too small has no hours (nan)."""
    s, ruled = Sizes(p), dict.fromkeys(("image", "patches"), "by the processor's rule")
    counted = (*PARTS, "embeddings", "trained")
    rows = [(f"parameters: {part}", s.n[part] / 1e6, "million", "counted") for part in counted]
    rows += [(f"tokens: {of}", n, "tokens", ruled.get(of, "counted on samples, about")) for of, n in s.length.items()]
    rows += [(f"memory: {what}", size / GB, "GB", how) for what, (size, how) in memory(p, s, CARDS[LARGE]).items()]
    how = "2 per weight or key and token forward, 2 to 6 back; without rollouts"
    rows += [(f"work: {arm}", flops / 1e15, "PFLOP", how) for arm, flops in work(p, s).items()]
    how = f"training at {REACHED:.0%} of the peak, measured on another card; assumed: "
    how += f"writing at {STREAMED:.0%} of the bandwidth, {1e3 * LAYER_STEP:g} ms a layer at least, "
    how += f"{ADAPTED} times that under adapters"
    for name, card in CARDS.items():
        need, room = most(memory(p, s, card)) / GB, USED * card.memory
        fits = "fits" if need < room else f"does not fit: {room:g} GB can be used; lower eval_batch, then sft_batch"
        rows.append((f"memory: most at once, {name}", need, "GB", fits))
        spent = {what: value if need < room else nan for what, value in hours(p, s, card).items()}
        cost = spent.pop("paid") * card.price
        rows += [(f"time: {what}, {name}", value, "hours", how) for what, value in spent.items()]
        rows.append((f"cost: {name}", cost, "USD", f"assumed: {card.price:g} USD an hour and card"))
    return pd.DataFrame(rows, columns=["quantity", "value", "unit", "how"])


def summary(studies: list[Params]) -> pd.DataFrame:
    """One line per study: parameters (billion), trained (million), most memory (GB), hours and cost by card, in words.

    The small card is given the study with `SPARING` limits, without which it would be too small for any.
    """
    sparing_card = f"{SMALL}, " + ", ".join(f"{key} ≤ {limit}" for key, limit in SPARING.items())
    rows = []
    for p in studies:
        spared = {key: min(limit, getattr(p, key)) for key, limit in SPARING.items()}
        spared["sft_accumulation"] = p.sft_batch * p.sft_accumulation // spared["sft_batch"]  # a step is as large
        less = p.model_copy(update=spared)
        value, sparing = (plan(q).set_index("quantity")["value"] for q in (p, less))
        size = sum(value[f"parameters: {part}"] for part in PARTS) / 1000
        row = {"study": p.study, "parameters_1e9": round(size, 2)}
        row["trained_1e6"] = round(value["parameters: trained"], 1)
        row["memory_gb"] = round(value[f"memory: most at once, {LARGE}"], 1)
        row[sparing_card] = _in_words(sparing, SMALL)
        rows.append(row | {card: _in_words(value, card) for card in CARDS if card != SMALL})
    return pd.DataFrame(rows)


def _in_words(value: pd.Series, card: str) -> str:
    """Hours and cost to two digits: no more of them mean anything."""
    spent, cost = (float(f"{value[name]:.2g}") for name in (f"time: the study, {card}", f"cost: {card}"))
    return "does not fit" if isnan(spent) else f"{spent:,.0f} h, {cost:,.0f} USD"
