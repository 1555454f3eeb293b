"""Small vision-language models of the real architecture, made from parameters; saved and loaded as any checkpoint.

Nothing here is a stand-in: the model is a `Qwen3VLForConditionalGeneration` or an `InternVLForConditionalGeneration`
(over Qwen3, as InternVL3.5) with the processor of its family, and a byte-level BPE tokenizer of its own.
`AutoModelForImageTextToText` and `AutoProcessor` load what `save` wrote.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from asym.params import Params, ParamsError
from asym.transcript import TAGS

disable_progress_bar()  # small checkpoints load in moments; long work has the study's own bar

PAD, END = "<|endoftext|>", "<|im_end|>"
IMAGE_TOKENS = {  # start of an image, its content, a video's, its end
    "qwen3_vl": ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"),
    "internvl": ("<img>", "<IMG_CONTEXT>", "<video>", "</img>"),
}
IMAGE_TEXT = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": r"<IMG_CONTEXT>\n",
}  # in a template
MERGE = 2  # 2×2 patches become one image token, in either family
TOGETHER = 2048  # tokens that a CPU passes at once: enough to keep it busy, few enough to stay in its caches
VOCABULARY = 1024  # an upper bound; the texts of a study need about half of it

# A word takes its separator with it (", 3" or " row" is one token): responses stay short, and nothing is lost.
_WORDS = r""", "?[\w-]+"?|"[\w-]+"|\], \[|\[+|\]+| ?\w+| ?[^\w\s]|\s+"""

# Qwen's chat format, reduced to what is used: images before text, no system prompt.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|> {{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ 'IMAGE' }}
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|> assistant
{% endif -%}"""


def build_tokenizer(texts: Iterable[str], family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges come from `texts`; it loses nothing on any other text either."""
    start, context, video, end = IMAGE_TOKENS[family]
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, "<|im_start|>", END, *IMAGE_TOKENS[family]],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(texts, [" user assistant"]), trainer)
    # The tags are ordinary text to the decoder (not special), but always one token each.
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=["<|im_start|>", *IMAGE_TOKENS[family]],
        extra_special_tokens={
            **{"start_image_token": start, "end_image_token": end},  # by these names InternVL's processor asks for them
            **{"context_image_token": context, "video_token": video},
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(texts: Iterable[str], p: Params) -> ProcessorMixin:
    """The processor of a small model: every image becomes (image_size / patch_size / MERGE)² tokens."""
    pixels = {"shortest_edge": p.image_size**2, "longest_edge": p.image_size**2}
    patches = {"patch_size": p.patch_size, "merge_size": MERGE, "temporal_patch_size": 2, "size": pixels}
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    common = {"tokenizer": build_tokenizer(texts, p.family)}
    common["chat_template"] = CHAT_TEMPLATE.replace("IMAGE", IMAGE_TEXT[p.family])
    if p.family == "internvl":
        whole = {"size": {"height": p.image_size, "width": p.image_size}}
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(**whole, **normalisation),
            video_processor=InternVLVideoProcessor(**whole, **normalisation),
            image_seq_length=(p.image_size // p.patch_size // MERGE) ** 2,
            **common,
        )
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, **normalisation),
        video_processor=Qwen3VLVideoProcessor(**patches, **normalisation),
        **common,
    )


def build_model(processor: ProcessorMixin, p: Params, seed: int) -> PreTrainedModel:
    """A model of the family with random weights at the study's size; proportions near the released models'."""
    token = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": p.hidden_size,
        "intermediate_size": 3 * p.hidden_size,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.heads,
        "num_key_value_heads": p.heads,
        "head_dim": p.hidden_size // p.heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": processor.tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    tokens = dict(zip(("start", "context", "video", "end"), map(token, IMAGE_TOKENS[p.family]), strict=True))
    torch.manual_seed(seed)
    build = _internvl if p.family == "internvl" else _qwen3_vl
    model = build(text, tokens, p)
    model.generation_config = GenerationConfig(
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    return model


def _qwen3_vl(text: dict, tokens: dict[str, int], p: Params) -> PreTrainedModel:
    rotary = text["head_dim"] // 2
    places = {"mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3], "mrope_interleaved": True}
    vision = {
        "depth": p.vision_layers,
        "hidden_size": p.vision_hidden_size,
        "intermediate_size": 3 * p.vision_hidden_size,
        "num_heads": p.heads,
        "patch_size": p.patch_size,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": p.hidden_size,
        "num_position_embeddings": (p.image_size // p.patch_size) ** 2,
        "deepstack_visual_indexes": [p.vision_layers // 2],
    }
    config = Qwen3VLConfig(
        text_config=text | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **places}},
        vision_config=vision,
        image_token_id=tokens["context"],
        video_token_id=tokens["video"],
        vision_start_token_id=tokens["start"],
        vision_end_token_id=tokens["end"],
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


def _internvl(text: dict, tokens: dict[str, int], p: Params) -> PreTrainedModel:
    vision = {
        "num_hidden_layers": p.vision_layers,
        "hidden_size": p.vision_hidden_size,
        "intermediate_size": 3 * p.vision_hidden_size,
        "num_attention_heads": p.heads,
        "image_size": p.image_size,
        "patch_size": p.patch_size,
    }
    config = InternVLConfig(
        text_config=text | {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        vision_config=vision,
        image_token_id=tokens["context"],
        image_seq_length=(p.image_size // p.patch_size // MERGE) ** 2,
        downsample_ratio=1 / MERGE,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


def save(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model (an adapter, if it is a PeftModel) and processor to a folder; `weights`, if the model lacks them."""
    model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    processor.save_pretrained(folder)


def fetch(name: str) -> Path:
    """The folder of a released model: a folder as it is, a hub id as its snapshot, downloaded where it is not yet.

    Raises ParamsError: there is no such model, no network, no access, or no room for it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        with _reaching(name):
            wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
            folder = Path(snapshot_download(name, allow_patterns=wanted))  # without a network, as far as it came
    missing = [kind for kind in ("config.json", "*.safetensors", "tokenizer*") if not any(folder.glob(kind))]
    for index in folder.glob("*.safetensors.index.json"):
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing += [part for part in parts if not (folder / part).exists()]
    if missing:
        raise ParamsError(f"model = {name!r}: the folder {folder} lacks {', '.join(missing)}")
    return folder.resolve()


def check(name: str, family: str) -> None:
    """Raises ParamsError if a released model is not to be had (`fetch`), of another family, or lacks a package."""
    folder = fetch(name)
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != family:
        raise ParamsError(
            f"model = {name!r}: is of type {found!r}, must be {family!r}, the parameter `family` (of InternVL take the "
            "variants whose name ends in -HF)"
        )
    with _readable(folder):
        AutoProcessor.from_pretrained(folder)


def config(name: str) -> PretrainedConfig:
    """The configuration of a released model, without its weights. Raises ParamsError as `fetch` does."""
    with _reaching(name):
        return AutoConfig.from_pretrained(name)


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        why = " ".join(str(error).split())[:300]
        raise ParamsError(
            f"model = {name!r}: is no folder here and cannot be downloaded ({why}). Without a network: where there is "
            f"one, `hf download {name} --local-dir FOLDER`; bring the folder here and set model to it"
        ) from None


def load(
    folder: Path, p: Params | None = None, merge: bool = True
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """A checkpoint and its processor; an adapter comes merged into the model it was trained on.

    Without `merge` it stays beside that, as it was trained: added to weights in bfloat16, a small update, as RL makes,
    would be rounded away. (One below it, which RL started from, is merged, as it was then.)

    Number format and kernel of attention are those of `p`, or of the checkpoint; on a GPU, if this process has one.
    Raises ParamsError if there is no such folder, if it cannot be read, or for want of a package.
    """
    if not folder.exists():
        raise ParamsError(f"{folder}: no weights are here; a run from an archive has none: delete {folder.parent}")
    kind = {"dtype": p.dtype, "attn_implementation": p.attention} if p else {}
    unset_hf_deepspeed_config()  # of a training before this one: weights would be loaded in parts, and saved misnamed
    with _readable(folder):
        processor = AutoProcessor.from_pretrained(folder)
        model = _merged(folder, kind, merge)
    processor.tokenizer.padding_side = "left"
    if isinstance(processor, InternVLProcessor):
        processor.image_processor.max_patches = 1  # an image is one tile, whatever its shape
    return model.to(PartialState().device), processor


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except ParamsError:
        raise
    except ImportError as error:  # says itself which package to install
        raise ParamsError(f"{folder}: {' '.join(str(error).split())}") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ParamsError(f"{folder}: is no checkpoint that can be read so ({why})") from None


def all_weights(folder: Path | str, **kind: Any) -> PreTrainedModel:
    """The model saved in a folder. Raises ParamsError if it cannot be read or lacks weights, else random ones."""
    with _readable(Path(folder)):
        model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **kind)
    if missing := sorted(found["missing_keys"]):
        few = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise ParamsError(f"{folder}: its files lack {len(missing)} of the model's weights: {few}")
    return model


def _merged(folder: Path, kind: dict[str, str], merge: bool = True) -> PreTrainedModel | PeftModel:
    if not (folder / "adapter_config.json").exists():
        return all_weights(folder, **kind)
    base = Path(PeftConfig.from_pretrained(folder).base_model_name_or_path)  # perhaps an adapter itself: SFT, then RL
    if not base.exists():  # runs/ has moved, all of it together
        base = folder.parents[1] / base.parent.name / base.name
    model = PeftModel.from_pretrained(_merged(base, kind), folder)
    if not merge:
        return model
    model = model.merge_and_unload()
    model.name_or_path = str(folder)  # what an adapter trained on it says it needs
    return model


def part_of(name: str) -> str:
    """The part of a vision-language model that a parameter or module belongs to, by its name."""
    if "merger" in name or "projector" in name:
        return "projector"
    return "vision" if ".visual." in name or "vision_tower" in name else "language"


def prepare_training(model: PreTrainedModel, p: Params) -> LoraConfig | None:
    """Freeze all but `p.trained_parts`; with `p.lora_rank`, LoRA on every linear layer of theirs but the output's."""
    for name, weights in model.named_parameters():
        weights.requires_grad = part_of(name) in p.trained_parts
    if not p.lora_rank:
        return None
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if part_of(name) in p.trained_parts and not name.endswith("lm_head")]
    return LoraConfig(r=p.lora_rank, lora_alpha=2 * p.lora_rank, target_modules=targets)


def as_trained(model: PreTrainedModel, p: Params, seed: int) -> PreTrainedModel | PeftModel:
    """The model at the start of a training: what SFT and RL would move has gradients, fresh adapters under LoRA.

    (The second matrix of a fresh adapter is zero, so the gradient of the first is, too; that of the second is a random
    projection of the full gradient.) Activations are recomputed where the study says so.
    """
    lora = prepare_training(model, p)
    if lora:
        torch.manual_seed(seed)
        model = get_peft_model(model, lora)
    if p.activation_checkpointing:
        model.activation_checkpointing_enable()
        model.train()  # layers recompute in training only; there is no dropout
    return model


def chat(processor: ProcessorMixin, query: str, image: bool) -> str:
    """The text of a prompt with its chat frame, up to where the response begins."""
    parts = [{"type": "image"}] * image + [{"type": "text", "text": query}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


_IMAGES = ("pixel_values", "image_grid_thw")  # what a processor returns for images; InternVL's has no grids


def encode_images(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """A processor's batch with its images encoded in place of their pixels: passes over its parts then share them."""
    if "pixel_values" not in inputs:
        return inputs
    features = model.get_image_features(**{name: inputs[name] for name in _IMAGES if name in inputs})
    kept = {name: values for name, values in inputs.items() if name != "pixel_values"}
    return kept | {"mm_encoder_outputs": {"image": features}}


def take(inputs: dict[str, Any], rows: torch.Tensor, width: int) -> dict[str, Any]:
    """Some rows (their indices) of a batch, cut to `width` tokens, with their images, at most one a row."""
    taken = {
        name: values[rows, :width] for name, values in inputs.items() if name not in (*_IMAGES, "mm_encoder_outputs")
    }
    if not {"pixel_values", "mm_encoder_outputs"} & set(inputs):
        return taken
    types = inputs.get("mm_token_type_ids")
    pictured = inputs["input_ids"].new_ones(len(inputs["input_ids"])) if types is None else types.any(1)
    images = (pictured.cumsum(0) - 1)[rows[pictured[rows].bool()]]
    if not len(images):
        return taken
    grid, pick = inputs.get("image_grid_thw"), lambda features: [features[image] for image in images]
    if "mm_encoder_outputs" in inputs:
        encoded = inputs["mm_encoder_outputs"]["image"]
        chosen = {"pooler_output": pick(encoded.pooler_output)}
        if grid is None:
            chosen["pooler_output"] = torch.stack(chosen["pooler_output"])
        else:
            chosen["deepstack_features"] = [pick(features) for features in encoded.deepstack_features]
        taken["mm_encoder_outputs"] = {"image": type(encoded)(**chosen)}
    elif grid is None:
        taken["pixel_values"] = inputs["pixel_values"][images]
    else:
        taken["pixel_values"] = torch.cat(pick(inputs["pixel_values"].split(grid.prod(1).tolist())))
    return taken if grid is None else taken | {"image_grid_thw": grid[images]}


def parts(lengths: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of a batch (their indices), longest first, in parts that one pass takes: padding then costs next to nothing.

    On a CPU a part holds at most `TOGETHER` tokens, cut to its longest row, or a single row; on a GPU it is the batch.
    """
    order = lengths.argsort(descending=True, stable=True)
    while len(order):
        count = max(1, TOGETHER // max(1, int(lengths[order[0]]))) if lengths.device.type == "cpu" else len(order)
        yield order[:count]
        order = order[count:]


def image_token_ids(processor: ProcessorMixin) -> list[int]:
    """Tokens a policy must not write: an image token without an image is an error in the forward pass."""
    vocabulary = processor.tokenizer.get_vocab()
    return [vocabulary[token] for tokens in IMAGE_TOKENS.values() for token in tokens if token in vocabulary]
