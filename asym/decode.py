"""Batched generation, faster than by `generate`, and the log-probabilities of what was written.

What makes the difference: every distinct prompt is encoded once and its keys and values are shared out to its copies;
keys and values lie in tensors made for the whole response, so that a step writes a column instead of copying all of
them; finished rows leave the batch; a step runs the decoder's layers and nothing else. Models that are not in `KNOWN`
generate with transformers' `generate`.
"""

from collections.abc import Sequence

import torch
from peft import PeftModel
from PIL.Image import Image
from transformers import Cache, PreTrainedModel, ProcessorMixin

from asym import models
from asym.models import chat, image_token_ids
from asym.runs import progress

KNOWN = ("qwen3_vl", "internvl")  # model types whose decoder layers are run here, one by one
LEAVE = 0.85  # finished rows are dropped once fewer than this share of the batch is still being written


def known(model: torch.nn.Module) -> bool:
    """Whether `decode` and `log_probs` can run this model: its layers, and attention that takes a Boolean mask."""
    return model.config.model_type in KNOWN and model.config.get_text_config()._attn_implementation == "sdpa"


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
    copies: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    label: str = "generating",
) -> list[str]:
    """The completions of prompts, each with its image (or None) and begun with its prefix.

    Args:
        prefixes: text every response is made to start with; part of the returned completion.
        batch: completions written at once.
        copies: completions of each prompt.
        temperature: 0 decodes greedily.
        seed: of the sampling; the same seed, batch size and machine give the same texts. Greedy decoding draws nothing.

    Returns:
        Completion texts without special tokens: all of the first prompt, then all of the second, and so on.
    """
    training = model.training
    model.eval()
    if temperature:
        torch.manual_seed(seed)
    prefixes = prefixes or [""] * len(queries)
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "forbidden": image_token_ids(processor)}
    completions, prompts = [], max(1, batch // copies)
    with progress(label, len(queries) * copies) as bar:
        for start in range(0, len(queries), prompts):
            rows = slice(start, start + prompts)
            pictures = [image for image in images[rows] if image]
            texts = [
                chat(processor, query, image is not None) + prefix
                for query, image, prefix in zip(queries[rows], images[rows], prefixes[rows], strict=True)
            ]
            inputs = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt").to(model.device)
            tokens = (decode if known(model) else _generate)(model, inputs, copies, **limits)
            begun = [prefix for prefix in prefixes[rows] for _ in range(copies)]
            texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            completions += [prefix + text for prefix, text in zip(begun, texts, strict=True)]
            bar.update(len(texts))
    model.train(training)  # a reward may ask in the middle of training
    return completions


@torch.no_grad()
def decode(
    model: PreTrainedModel | PeftModel,
    inputs: dict[str, torch.Tensor],
    copies: int,
    *,
    max_new_tokens: int,
    temperature: float,
    forbidden: Sequence[int] = (),
) -> list[list[int]]:
    """Write `copies` completions of every prompt: when greedy, the tokens that `generate` writes.

    Args:
        inputs: what the processor returns for the prompts, left-padded.
        temperature: 0 decodes greedily.
        forbidden: tokens that are never written.

    Returns:
        Token ids, all completions of the first prompt first; an end token, where one was written, is the last.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # its adapters are in its layers
    decoder, head = model.model.language_model, model.get_output_embeddings()
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device).reshape(-1)

    cache, mask, places, logits = _encode(model, inputs)
    states = _KeyValues(cache, mask, copies, max_new_tokens)
    logits, places = (rows.repeat_interleave(copies, 0) for rows in (logits, places))

    written = ends[0].new_zeros((len(logits), max_new_tokens))
    lengths = ends.new_full((len(logits),), max_new_tokens)
    rows = torch.arange(len(logits), device=model.device)  # those still in the batch
    for step in range(max_new_tokens):
        logits[:, forbidden] = -torch.inf
        chosen = _choose(logits, temperature)
        written[rows, step] = chosen
        lengths[rows] = torch.where(torch.isin(chosen, ends), lengths[rows].clamp(max=step + 1), lengths[rows])
        going = (lengths[rows] > step + 1).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < LEAVE * len(rows):
            rows, chosen, places = rows[going], chosen[going], places[going]
            states.keep(going)
        hidden = decoder.embed_tokens(chosen)[:, None]  # (B, 1, hidden)
        rotary = decoder.rotary_emb(hidden, (places + step)[:, None])
        attended = states.grow()
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=attended, past_key_values=states, position_embeddings=rotary)
        logits = head(decoder.norm(hidden[:, 0]))
    return [ids[:length] for ids, length in zip(written.tolist(), lengths.tolist(), strict=True)]


def _encode(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded prompts encoded: keys and values, mask (B, T), and of the next token place (B,) and logits (B, V)."""
    mask, places = inputs["attention_mask"].bool(), inputs["attention_mask"].sum(1)
    pictured = "image_grid_thw" in inputs  # Qwen then places tokens itself: an image takes fewer places
    positions = {} if pictured else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    encoded = model(**inputs, **positions, use_cache=True, logits_to_keep=1)
    if pictured:
        places = places + model.model.rope_deltas[:, 0]
    return encoded.past_key_values, mask, places, encoded.logits[:, -1]


def log_probs(
    model: PreTrainedModel | PeftModel,
    inputs: dict[str, torch.Tensor],
    prompt: torch.Tensor,
    completions: torch.Tensor,
    lengths: torch.Tensor,
    moving: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every token of some completions, and the entropy of the distribution that it was drawn from.

    Prompts are encoded once for all their completions; those of like length pass together. The logits of all are kept
    for the backward pass: made for a small vocabulary.

    Args:
        inputs: what the processor returns for the distinct prompts, left-padded.
        prompt: which of them each completion belongs to (B,).
        completions: token ids (B, T), right-padded.
        lengths: tokens of each, (B,).
        moving: which completions need gradients (B,); entropies have none.
        temperature: what logits are divided by.

    Returns:
        Two of (B, T), 0 beyond the length.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    decoder, head = model.model.language_model, model.get_output_embeddings()
    cache, mask, places, logits = _encode(model, inputs)
    order, found = [], []
    for some in (moving.nonzero()[:, 0], (~moving).nonzero()[:, 0]):
        for rows in (some[part] for part in models.parts(lengths[some])):
            width = int(lengths[rows[0]].clamp(min=1))
            ids, of = completions[rows, :width], prompt[rows]
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(moving[rows[0]])):
                states = _Shared(cache, of)
                hidden = decoder.embed_tokens(ids)
                steps = torch.arange(width, device=ids.device)
                rotary = decoder.rotary_emb(hidden, places[of, None] + steps)
                causal = (steps <= steps[:, None]).expand(len(of), -1, -1)
                attended = torch.cat([mask[of, None].expand(-1, width, -1), causal], 2)[:, None]
                for layer in decoder.layers:
                    hidden = layer(hidden, attention_mask=attended, past_key_values=states, position_embeddings=rotary)
                next_logits = head(decoder.norm(hidden[:, :-1]))  # the last token is followed by none
                scores = (torch.cat([logits[of, None], next_logits], 1).float() / temperature).log_softmax(-1)
                chosen = scores.gather(2, ids[..., None])[..., 0]
                with torch.no_grad():
                    entropy = -(scores.exp() * scores).sum(-1)
            written = steps < lengths[rows, None]
            missing = (0, completions.shape[1] - width)
            order.append(rows)
            found.append([torch.nn.functional.pad(values * written, missing) for values in (chosen, entropy)])
    back = torch.cat(order).argsort()
    return tuple(torch.cat(each)[back] for each in zip(*found, strict=True))


class _Shared:
    """Keys and values of prompts, each for its completions: `update` puts those of the completions behind them."""

    def __init__(self, cache: Cache, prompt: torch.Tensor):
        self.cache, self.prompt = cache, prompt

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.cache.layers[layer]
        pairs = ((before.keys, keys), (before.values, values))
        return tuple(torch.cat([given.index_select(0, self.prompt), new], 2) for given, new in pairs)


def _choose(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The next token of every row: (B, vocabulary) → (B,)."""
    if not temperature:
        return logits.argmax(-1)
    mass = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # One random number per row, where torch.multinomial draws one per row and token
    drawn = torch.rand(len(mass), 1, dtype=mass.dtype, device=mass.device) * mass[:, -1:]
    return torch.searchsorted(mass, drawn, right=True)[:, 0]


class _KeyValues:
    """Keys and values of a batch, with room for all tokens to come: `update` writes one column and returns views.

    It offers of transformers' `Cache` what decoder layers use. The copies of a prompt lie next to each other.
    """

    def __init__(self, cache: Cache, mask: torch.Tensor, copies: int, room: int):
        self.length = mask.shape[1]
        self.layers = []
        for layer in cache.layers:
            # (B, heads, T, head_dim)
            shape = (len(mask) * copies, layer.keys.shape[1], self.length + room, layer.keys.shape[3])
            roomy = [layer.keys.new_empty(shape) for _ in range(2)]
            for tensor, encoded in zip(roomy, (layer.keys, layer.values), strict=True):
                tensor[:, :, : self.length] = encoded.repeat_interleave(copies, 0)
            self.layers.append(roomy)
        self.mask = None
        if not mask.all():  # else nothing is padded and every row attends to all its columns
            self.mask = torch.nn.functional.pad(mask, (0, room), value=True).repeat_interleave(copies, 0)[:, None, None]

    def grow(self) -> torch.Tensor | None:
        """Begin the next column; returns which columns each row may attend to (B, 1, 1, T), None for all."""
        self.length += 1
        return None if self.mask is None else self.mask[..., : self.length]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        for tensor, column in zip(self.layers[layer], (keys, values), strict=True):
            tensor[:, :, self.length - 1 : self.length] = column
        return tuple(tensor[:, :, : self.length] for tensor in self.layers[layer])

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all but these rows, which ascend, moving only what is filled."""
        for tensors in self.layers:
            for index, tensor in enumerate(tensors):
                tensor[: len(rows), :, : self.length] = tensor[rows, :, : self.length]
                tensors[index] = tensor[: len(rows)]
        if self.mask is not None:
            self.mask = self.mask[rows]


def _generate(model, inputs, copies: int, *, max_new_tokens: int, temperature: float, forbidden) -> torch.Tensor:
    """What `decode` does, by transformers' `generate`."""
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        sampling["num_return_sequences"] = copies
    padding = torch.tensor(model.generation_config.eos_token_id).flatten()[0].item()  # a release may name no other
    limits = {"max_new_tokens": max_new_tokens, "suppress_tokens": forbidden, "pad_token_id": padding}
    limits["repetition_penalty"] = 1.0  # this, top_k and top_p are else those that a release brings along
    written = model.generate(**inputs, **limits, **sampling)[:, inputs["input_ids"].shape[1] :]
    return written if temperature else written.repeat_interleave(copies, 0)
