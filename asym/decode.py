"""Batched generation: prompts in, completion texts out."""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from transformers import PreTrainedModel, ProcessorMixin

from asym.models import chat, image_token_ids
from asym.runs import progress


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    queries: Sequence[str],
    images: Sequence[Image | None],
    prefixes: Sequence[str] | None = None,
    *,
    max_new_tokens: int,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
    label: str = "generating",
) -> list[str]:
    """The completions of prompts, each with its image (or None) and begun with its prefix.

    Args:
        prefixes: text every response is made to start with; part of the returned completion.
        temperature: 0 decodes greedily.
        seed: of the sampling; the same seed, batch size and machine give the same texts.

    Returns:
        Completion texts without special tokens, in the order of the prompts.
    """
    model.eval()
    torch.manual_seed(seed)
    prefixes = prefixes or [""] * len(queries)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    completions = []
    with progress(label, len(queries)) as bar:
        for start in range(0, len(queries), batch):
            rows = slice(start, start + batch)
            pictures = [image for image in images[rows] if image]
            texts = [
                chat(processor, query, image is not None) + prefix
                for query, image, prefix in zip(queries[rows], images[rows], prefixes[rows], strict=True)
            ]
            inputs = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt").to(model.device)
            tokens = model.generate(
                **inputs, max_new_tokens=max_new_tokens, suppress_tokens=image_token_ids(processor), **sampling
            )
            new = processor.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            completions += [prefix + text for prefix, text in zip(prefixes[rows], new, strict=True)]
            bar.update(len(texts))
    return completions
