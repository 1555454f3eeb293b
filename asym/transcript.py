"""The response grammar: perception, then reasoning, then answer, each once, in its own tags.

    <perception>[[1, "-"], ["-", 1]]</perception>
    <reasoning>…</reasoning>
    <answer>[[1, 2], [2, 1]]</answer>

Everything that must know where perception ends (losses, rewards, scores, the counterfactual prefill) asks this module.
Model output is hostile: `split` never raises and takes time linear in the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SEGMENTS = ("perception", "reasoning", "answer")
PERCEPTION, REASONING = 1, 2  # segment ids of tokens; the answer trains with the reasoning, 0 is everything else
TAGS = tuple(f"<{slash}{name}>" for name in SEGMENTS for slash in ("", "/"))
CLOSING = TAGS[1]  # of the perception span

_TAG = re.compile("|".join(TAGS))


@dataclass(frozen=True)
class Response:
    """A completion taken apart. `failure` says why it is malformed ("" when it is not).

    A malformed one keeps its perception if it begins with a closed perception span: what was seen does not depend on
    what was written after it. Its other texts are empty.
    """

    perception: str = ""
    reasoning: str = ""
    answer: str = ""
    failure: str = ""


def compose(perception: str, reasoning: str, answer: str) -> str:
    """The text of a response. A line break between segments keeps byte-level tokens from straddling them."""
    return "\n".join(map(tagged, SEGMENTS, (perception, reasoning, answer)))


def tagged(segment: str, text: str) -> str:
    """The text of one segment in its tags."""
    return f"<{segment}>{text}</{segment}>"


def prefill(perception: str) -> str:
    """The start of a response up to where its reasoning begins, for counterfactual reasoning (a_r).

    It ends in the line break after the perception: there, unlike within a tag, every tokenizer ends a token.
    """
    return tagged("perception", perception) + "\n"


def split(completion: str) -> Response:
    """Take a completion apart; anything but the three segments in order, each once, is a failure with its reason."""
    tags = [(match.group(), match.start(), match.end()) for match in _TAG.finditer(completion)]
    names = tuple(tag for tag, _, _ in tags)
    if names != TAGS:
        return Response(_first_span(completion), failure=_what_is_wrong(completion, names))
    bounds = [0, *(position for _, start, end in tags for position in (start, end)), len(completion)]
    pieces = [completion[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    # pieces: before, perception, between, reasoning, between, answer, after
    if any(piece.strip() for piece in pieces[::2]):
        return Response(_first_span(completion), failure="text outside the tags")
    return Response(*(piece.strip() for piece in pieces[1::2]))


def _first_span(completion: str) -> str:
    """The text of the perception span that a completion begins with, "" if it does not begin with a closed one."""
    before, _, rest = completion.partition(TAGS[0])
    text, closing, _ = rest.partition(CLOSING)
    return text.strip() if closing and not before.strip() else ""


def _what_is_wrong(completion: str, names: tuple[str, ...]) -> str:
    if not completion.strip():
        return "empty completion"
    for tag in TAGS:
        if names.count(tag) > 1:
            return f"{tag} more than once"
    for tag in TAGS:
        if tag not in names:
            return f"no {tag}"
    return "tags out of order"


def segment_ids(completion: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The segment of every token of a completion.

    Args:
        completion: a well-formed response, or any text whose perception span is closed.
        offsets: (start, end) in characters of each token, as a fast tokenizer returns them.

    Returns:
        One id per token. A token belongs to the segment that holds its first character: PERCEPTION up to and with
        `</perception>`, REASONING from there on. Empty tokens (some tokenizers end with one) count as REASONING.

    Raises:
        ValueError: the text has no closed perception span.
    """
    end = completion.find(CLOSING)
    if end < 0:
        raise ValueError(f"no perception span in {completion[:60]!r}")
    end += len(CLOSING)
    return [PERCEPTION if start < end and stop > start else REASONING for start, stop in offsets]
