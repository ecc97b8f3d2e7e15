"""Ids of texts, leading tokens, end tokens, and the rules of truncation for any lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modern_llm.config.errors import UserError
from modern_llm.data.encode.tokenizer import (
    Encoder,
    Limits,
    Truncation,
    TruncationCounts,
    check_tokenizers_agree,
    default_limits,
    tokenizer_identity,
)
from modern_llm.data.read.records import ContentFault

TEXTS = ["Boats came in.", "", " \n\n", "ünï 漢字 😀", "a<|end|>b", "<|begin|>The harbour" * 50]
END, LEAD = 7, 5


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("begin", [False, True])
def test_ids_are_those_of_the_tokenizer_without_added_tokens(begin: bool, make_tokenizer):
    tokenizer = make_tokenizer(begin=begin)
    found = Encoder(tokenizer)(TEXTS)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert [array.tolist() for array in found] == expected
    assert all(array.dtype == np.int32 for array in found)
    assert tokenizer.decode(found[3]) == TEXTS[3]


def test_padding_and_truncation_of_the_backend_are_switched_off(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    encoder = Encoder(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert tokenizer.decode(encoder([TEXTS[0]])[0]) == TEXTS[0]


def test_a_tokenizer_that_does_more_than_its_backend_is_called_itself(make_tokenizer):
    tokenizer = make_tokenizer()

    class Shouting:
        def __call__(self, texts, **options):
            upper = texts.upper() if isinstance(texts, str) else [text.upper() for text in texts]
            return tokenizer(upper, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    found = Encoder(Shouting())(["boats", "Came in"])
    assert [tokenizer.decode(array) for array in found] == ["BOATS", "CAME IN"]


def test_leading_tokens_are_added_once(make_tokenizer):
    encoder = Encoder(make_tokenizer(begin=True))
    lead = encoder.lead.tolist()
    assert len(lead) == 1
    bare, led = encoder(["The harbour", "<|begin|>The harbour"])
    assert encoder.with_lead(bare).tolist() == [*lead, *bare] == led.tolist()
    assert encoder.with_lead(led).tolist() == led.tolist()
    assert encoder.with_lead(ids()).tolist() == lead
    plain = Encoder(make_tokenizer())
    assert plain.lead.tolist() == [] and plain.with_lead(bare).tolist() == bare.tolist()


def truncation(
    total: int, prompt: int, lead: int = 0, end: int | None = END, **options
) -> Truncation:
    return Truncation(Limits(total, prompt, lead), end, cuts=TruncationCounts(), **options)


def run(cut: Truncation, prompt, *responses, has_lead: bool = False) -> list[list[int]]:
    return [part.tolist() for part in cut(prompt, responses, has_lead=has_lead)]


def test_an_example_that_fits_gets_its_end_token_and_is_not_truncated():
    cut = truncation(8, 3)
    assert run(cut, ids(1, 2, 3), ids(10, 11), ids(20, END)) == [
        [1, 2, 3],
        [10, 11, END],
        [20, END],
    ]
    assert cut.cuts == TruncationCounts()


def test_the_prompt_loses_its_start_by_what_the_longer_answer_needs():
    cut = truncation(8, 2)
    parts = run(cut, ids(1, 2, 3, 4, 5, 6), ids(10, 11, 12), ids(20))
    assert parts == [[3, 4, 5, 6], [10, 11, 12, END], [20, END]]
    assert cut.cuts == TruncationCounts(prompts=1, responses=0, tokens=2)


def test_then_the_answers_lose_their_ends_and_get_no_end_token():
    cut = truncation(6, 3)
    parts = run(cut, ids(1, 2, 3, 4, 5), ids(10, 11, 12, 13), ids(20))
    assert parts == [[3, 4, 5], [10, 11, 12], [20, END]]
    assert cut.cuts == TruncationCounts(prompts=1, responses=1, tokens=2 + 2)


def test_an_answer_that_fits_only_without_its_end_token_is_truncated():
    assert run(truncation(5, 3), ids(1, 2, 3), ids(10, 11), ids(20)) == [
        [1, 2, 3],
        [10, 11],
        [20, END],
    ]


def test_leading_tokens_survive_and_do_not_count_as_the_end_of_the_prompt():
    cut = truncation(8, 3, lead=1)
    parts = run(cut, ids(LEAD, 1, 2, 3, 4), ids(10, 11, 12, 13, 14), ids(20), has_lead=True)
    assert parts == [[LEAD, 2, 3, 4], [10, 11, 12, 13], [20, END]]
    # A chat prompt that starts differently has no such tokens to keep.
    assert run(cut, ids(1, 2, 3, 4, 5), ids(10, 11, 12, 13, 14))[0] == [3, 4, 5]


def test_a_truncated_answer_never_ends_like_a_finished_one():
    assert run(truncation(5, 1), ids(1), ids(10, 11, END, END, 12, 13), ids(20)) == [
        [1],
        [10, 11],
        [20, END],
    ]


def test_without_appending_nothing_is_added():
    cut = truncation(5, 1, append=False)
    assert run(cut, ids(1), ids(10, 11), ids(20, END)) == [[1], [10, 11], [20, END]]


def test_end_tokens_of_the_text_are_kept_as_they_are():
    assert run(truncation(9, 1), ids(1), ids(10, END, END), ids(END, 20)) == [
        [1],
        [10, END, END],
        [END, 20, END],
    ]


@pytest.mark.parametrize(
    ("limits", "prompt", "responses", "reason"),
    [
        ((8, 2), ids(1), [ids(), ids(20)], "empty response"),
        ((8, 2), ids(1), [ids(10), ids(END, END)], "empty response"),
        ((4, 2), ids(1, 2), [ids(10, 11, 12), ids(10, 11, 13)], "equal responses after truncation"),
        ((8, 2), ids(1), [ids(10), ids(10, END)], "equal responses after truncation"),
        ((4, 0), ids(), [ids(END, END, END, END, 1), ids(2)], "empty response after truncation"),
    ],
)
def test_nothing_to_learn_from_is_bad_content(limits, prompt, responses, reason):
    cut = truncation(*limits)
    with pytest.raises(ContentFault, match=f"^{reason}$"):
        cut(prompt, responses, has_lead=False)
    assert cut.cuts == TruncationCounts(), "a dropped row is not counted as truncated"


def test_without_a_prompt_the_first_token_is_not_a_target():
    cut = truncation(8, 0, append=False)
    with pytest.raises(ContentFault, match="empty response after truncation"):
        cut(ids(), [ids(10), ids(20, 21)], has_lead=False)
    assert run(cut, ids(), ids(10, 11), ids(20, 21)) == [[], [10, 11], [20, 21]]


def test_limits_that_leave_no_room_are_refused():
    assert default_limits(512, None, 1) == Limits(512, 256, 1)
    assert default_limits(2, None, 1) == Limits(2, 0, 1)
    assert default_limits(512, 0, 1) == Limits(512, 0, 1)
    for limits in [(512, 512, 0), (512, 511, 1), (512, 600, 0)]:
        with pytest.raises(UserError, match=f"max_prompt_length {limits[1]} .*max_length 512"):
            default_limits(*limits)


token_lists = st.lists(st.integers(10, 99), max_size=25).map(lambda values: ids(*values))


@settings(deadline=None, max_examples=200)
@given(
    total=st.integers(1, 30),
    keep=st.integers(0, 30),
    lead=st.integers(0, 2),
    body=token_lists,
    responses=st.lists(token_lists, min_size=1, max_size=2),
)
def test_any_lengths_keep_the_rules(total, keep, lead, body, responses):
    assume(keep + lead < total)
    cut = truncation(total, keep, lead)
    prompt = np.concatenate([np.full(lead, LEAD, dtype=np.int32), body])
    try:
        kept, *answers = cut(prompt, responses, has_lead=True)
    except ContentFault:
        shortest = min(map(len, responses))
        same = len({tuple(r) for r in responses}) < len(responses)
        common = len(responses) == 2 and tuple(responses[0][:1]) == tuple(responses[1][:1])
        # Only these may leave nothing to learn: no answer, equal answers, or too little room.
        assert shortest == 0 or same or common or (lead == 0 and (keep == 0 or len(body) == 0))
        return
    kept_body = len(kept) - lead
    assert kept[:lead].tolist() == [LEAD] * lead
    assert kept[lead:].tolist() == body[len(body) - kept_body :].tolist()
    assert kept_body >= min(keep, len(body))
    longest = max(len(r) for r in responses) + 1
    if kept_body < len(body):
        assert kept_body == keep or len(kept) + longest == total
    for whole, answer in zip(responses, answers, strict=True):
        assert 1 <= len(answer) and len(kept) + len(answer) <= total
        finished = len(kept) + len(whole) + 1 <= total
        assert (answer[-1] == END) == finished
        if finished:
            assert answer.tolist() == [*whole, END]
        else:
            assert answer.tolist() == whole[: len(answer)].tolist()
            assert len(kept) + len(answer) == total and kept_body <= keep
    lost = [len(w) + 1 - len(a) for w, a in zip(responses, answers, strict=True)]
    assert cut.cuts.tokens == len(body) - kept_body + sum(lost)


def test_identity_depends_on_content_not_on_use(make_tokenizer):
    first, second = make_tokenizer(), make_tokenizer()
    first(["a"], truncation=True, max_length=1)
    assert tokenizer_identity(first) == tokenizer_identity(second)
    others = [make_tokenizer(begin=True), make_tokenizer(chat="x"), make_tokenizer(end=False)]
    others.append(make_tokenizer(size=300))
    identities = {tokenizer_identity(tokenizer) for tokenizer in [first, *others]}
    assert len(identities) == 5


def test_tokenizers_are_compared_on_a_sample(make_tokenizer):
    tokenizer = make_tokenizer()
    check_tokenizers_agree(tokenizer, make_tokenizer(), TEXTS)
    with pytest.raises(
        UserError, match="two tokenizers disagree: the ids of 'The harbour was quiet"
    ):
        check_tokenizers_agree(tokenizer, make_tokenizer(size=300), ["a", "The harbour was quiet"])
    with pytest.raises(UserError, match=r"prompts begin with \[\] and \[1\]"):
        check_tokenizers_agree(tokenizer, make_tokenizer(begin=True), TEXTS)
    with pytest.raises(UserError, match="the end tokens are 0 and None"):
        check_tokenizers_agree(tokenizer, make_tokenizer(end=False), TEXTS)
