"""Released models with their sizes shrunk and nothing else: what `models.fetch` would find on the hub, in small."""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from asym.base import vocabulary
from asym.params import Params
from asym.plan import config_of

TEXT = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64}
DEPTH = {
    "qwen3_vl": {"depth": 4, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2]},
    "internvl": {"num_hidden_layers": 2, "num_attention_heads": 2, "attention_bias": True},
}
ROPE = {"rope_type": "default", "rope_theta": 5e6}
PLACES = {
    "qwen3_vl": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
    "internvl": {"rope_parameters": ROPE, "layer_types": ["full_attention"] * 3},
}
QWEN = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
INTERN = {"start_image_token": "<img>", "end_image_token": "</img>"}
INTERN |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
IDS = {
    "qwen3_vl": {
        **{"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        **{"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"},
    },
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write(name: str, folder: Path) -> None:
    """A checkpoint like that of a hub id, in bfloat16 and two shards, with its processor."""
    config, tokens = config_of(Params(model=name)), tokenizer()
    family, ends = config.model_type, tokens.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    # The embedding has more rows than the tokenizer has tokens
    config.text_config.update(TEXT | PLACES[family] | {"vocab_size": len(tokens) + 34})
    config.vision_config.update(VISION | DEPTH[family])
    config.update({key: tokens.convert_tokens_to_ids(token) for key, token in IDS[family].items()})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        **{"eos_token_id": ends, "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        pad_token_id=ends[1] if family == "qwen3_vl" else None,  # not every release names one
    )
    model.save_pretrained(folder, max_shard_size=int(1.2 * model.num_parameters()))
    processor(family).save_pretrained(folder)


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Qwen's pipeline; as in its vocabulary, special tokens come last, and some tokens straddle the ends of tags."""
    backend, alphabet = Qwen2Tokenizer().backend_tokenizer, ByteLevel.alphabet()
    texts = [*vocabulary(Params(), 0), *["<b>[[1, 2]]</b>\n<i>"] * 100]
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False))
    bpe = json.loads(backend.to_str())["model"]
    merges = list(map(tuple, bpe["merges"]))
    trained = Qwen2Tokenizer(bpe["vocab"], merges, eos_token="<|im_end|>", extra_special_tokens=INTERN)
    trained.add_tokens(QWEN, special_tokens=True)
    return trained


def processor(family: str) -> ProcessorMixin:
    """The family's, with its settings for images and its chat template."""
    if family == "internvl":
        tile = {"size": {"height": 448, "width": 448}}
        return InternVLProcessor(
            GotOcr2ImageProcessor(**tile),
            tokenizer(),
            InternVLVideoProcessor(**tile),
            image_seq_length=256,
            chat_template=TEMPLATE.replace("IMAGE", r"<IMG_CONTEXT>\n"),
        )
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    patches |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 256**2, "longest_edge": 4096**2}, **patches),
        tokenizer(),
        Qwen3VLVideoProcessor(**patches),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
