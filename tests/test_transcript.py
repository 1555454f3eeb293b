import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from asym.models import build_tokenizer
from asym.transcript import PERCEPTION, REASONING, TAGS, Response, compose, prefill, segment_ids, split

SEEN = '[[1, "-", 3, 4], [3, 4, "-", 2]]'
RESPONSE = compose(SEEN, "r1c2: row 1 3 4, gives 2. é → 漢字 🙂", "[[1, 2, 3, 4]]")
# The pre-tokenizer of Qwen2 to Qwen3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SEGMENT = st.text().filter(lambda text: not any(tag in text for tag in TAGS))
HOSTILE = st.lists(st.sampled_from([*TAGS, "<perception", "reasoning>", "[[1]]", "٣", "\n"]) | st.text()).map("".join)
patient = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


@pytest.fixture(scope="module", params=["small", "qwen"])
def tokenizer(request):
    """The project's own tokenizer, whose tags are tokens; and one that knows no tags, as the released models'."""
    if request.param == "small":
        return build_tokenizer([RESPONSE] * 3, "qwen3_vl")
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([RESPONSE] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def encode(tokenizer, text):
    tokens = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return tokens["input_ids"], tokens["offset_mapping"]


def test_composed_response_splits_into_its_segments():
    assert split(compose("p", " r ", "a")) == Response("p", "r", "a")


@patient
@given(SEGMENT, SEGMENT, SEGMENT)
def test_any_segments_survive_compose_and_split(perception, reasoning, answer):
    assert split(compose(perception, reasoning, answer)) == Response(*map(str.strip, (perception, reasoning, answer)))


@pytest.mark.parametrize(
    ("completion", "failure"),
    [
        ("", "empty completion"),
        (" \n\t", "empty completion"),
        ("[[1, 2]]", "no <perception>"),
        ("<perception>1</perception><reasoning>2</reasoning>", "no <answer>"),
        (compose("1", "2", "3").removesuffix("</answer>"), "no </answer>"),
        (compose("1", "2", "3") * 2, "<perception> more than once"),
        (compose("<perception>1</perception>", "2", "3"), "<perception> more than once"),
        (compose("1", "2 </reasoning>", "3"), "</reasoning> more than once"),
        ("<perception>1<answer>3</answer></perception><reasoning>2</reasoning>", "tags out of order"),
        ("<reasoning>2</reasoning><perception>1</perception><answer>3</answer>", "tags out of order"),
        ("Sure! " + compose("1", "2", "3"), "text outside the tags"),
        (compose("1", "2", "3") + ".", "text outside the tags"),
        (compose("1", "2", "3").replace("<answer>", "so <answer>"), "text outside the tags"),
        (compose("1", "2", "3").upper(), "no <perception>"),
    ],
)
def test_malformed_completion_fails_with_its_reason(completion, failure):
    response = split(completion)
    assert response == Response(response.perception, failure=failure)


@pytest.mark.parametrize(
    ("completion", "perception"),
    [
        (" <perception> 1 </perception>", "1"),
        (compose("1", "2", "3").partition("</reasoning>")[0], "1"),
        (compose("1", "2", "3") + compose("4", "5", "6"), "1"),
        (compose("1", "2 <perception>4</perception>", "3"), "1"),
        ("so " + compose("1", "2", "3"), ""),
        ("<perception>1", ""),
        ("</perception>" + compose("1", "2", "3"), ""),
        ("<reasoning>2</reasoning><perception>1</perception>", ""),
    ],
)
def test_a_malformed_completion_keeps_the_perception_it_begins_with(completion, perception):
    assert split(completion).failure
    assert split(completion).perception == perception


@patient
@given(HOSTILE)
def test_no_text_makes_split_raise(completion):
    response = split(completion)
    assert response == Response(response.perception, failure=response.failure) or not response.failure


@pytest.mark.parametrize("unit", ["<perception>", "<", "<perception", " ", "</answer><answer>", "é<reasoning>[[1"])
def test_split_takes_time_linear_in_the_text(unit):
    def best_of_three(size: int) -> float:
        completion, times = unit * (size // len(unit)), []
        for _ in range(3):
            start = time.process_time()
            split(completion)
            times.append(time.process_time() - start)
        return min(times)

    assert best_of_three(1_000_000) < 40 * max(best_of_three(100_000), 1e-4)  # quadratic: 100 times


def test_spans_cover_exactly_the_perception(tokenizer):
    ids, offsets = encode(tokenizer, RESPONSE)
    segments = segment_ids(RESPONSE, offsets)
    assert len(segments) == len(ids)
    n_p = segments.count(PERCEPTION)
    assert segments == [PERCEPTION] * n_p + [REASONING] * (len(ids) - n_p)
    end = RESPONSE.index("</perception>") + len("</perception>")
    spelled = tokenizer.decode(ids[:n_p])
    assert spelled.strip() == RESPONSE[:end]
    assert tokenizer.decode(ids[: n_p - 1]) in RESPONSE[: end - 1]  # the last perception token is needed to close it


@patient
@given(SEGMENT, SEGMENT)
@example("", "")
@example("漢🙂", "́e")
def test_spans_hold_for_any_content(tokenizer, perception, reasoning):
    text = compose(perception, reasoning, "[]")
    _, offsets = encode(tokenizer, text)
    segments = segment_ids(text, offsets)
    n_p = segments.count(PERCEPTION)
    assert segments == sorted(segments)
    assert offsets[n_p - 1][0] < len(f"<perception>{perception}</perception>") <= offsets[n_p][0] + 1


def test_counterfactual_start_is_a_start_of_the_response_token_by_token(tokenizer):
    ids, _ = encode(tokenizer, RESPONSE)
    start, _ = encode(tokenizer, prefill(SEEN))
    assert RESPONSE.startswith(prefill(SEEN))
    assert ids[: len(start)] == start


def test_empty_tokens_are_reasoning():
    assert segment_ids("<perception></perception>", [(0, 0), (0, 25), (25, 25)]) == [REASONING, PERCEPTION, REASONING]


def test_a_text_without_perception_has_no_spans():
    with pytest.raises(ValueError, match="no perception span in '<perception>1'"):
        segment_ids("<perception>1", [(0, 1)])
