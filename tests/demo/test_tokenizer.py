"""The demo's tokenizer: exact round trips, the end token, the size, the same file every time."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modern_llm.config.errors import StorageError
from modern_llm.demo.corpus import CorpusPaths, write_corpus
from modern_llm.demo.facts import relations
from modern_llm.demo.tokenizer import END_TOKEN, PAD_TOKEN, VOCAB_SIZE, build_tokenizer
from modern_llm.storage import fault_points


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusPaths:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 3)


@pytest.fixture(scope="module")
def documents(corpus) -> list[str]:
    lines = corpus.documents.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    assert build_tokenizer(folder, documents) == folder
    return AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def test_every_text_of_the_corpus_round_trips(corpus, tokenizer):
    texts = 0
    for path in asdict(corpus).values():
        for line in path.read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                assert tokenizer.decode(ids_of(tokenizer, text)) == text
                texts += 1
    assert texts > 10_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_other_text_round_trips(tokenizer, text):
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_spaces_before_punctuation_stay(tokenizer):
    text = " a , b .  c 's n't ?\n\n x "
    assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_special_tokens_and_size(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END_TOKEN, 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD_TOKEN, 1)
    assert 500 < len(tokenizer) <= VOCAB_SIZE
    ids = ids_of(tokenizer, "Question: Add 1 and 2.\nAnswer: 3.")
    assert not set(ids) & {0, 1}, "encoding adds no special token"
    assert ids_of(tokenizer, f" 3.{END_TOKEN}") == [*ids_of(tokenizer, " 3."), 0]


def test_prompt_and_answer_split_where_they_are_joined(tokenizer):
    """Training on answers tokenises them apart, on documents together: the ids must agree."""
    prompt, answer = "Question: What is 7 plus 5?\nAnswer:", " 12."
    assert ids_of(tokenizer, prompt) + ids_of(tokenizer, answer) == ids_of(
        tokenizer, prompt + answer
    )


def test_the_corpus_is_short_in_tokens(tokenizer, documents):
    lengths = [len(ids_of(tokenizer, text)) for text in documents]
    assert max(lengths) < 64
    answers = {fact.answer for relation in relations() for fact in relation.facts}
    single = [answer for answer in answers if len(ids_of(tokenizer, f" {answer}")) == 1]
    assert len(single) > len(answers) / 2


def test_the_same_texts_give_the_same_file(documents, tmp_path):
    folders = [build_tokenizer(tmp_path / name, documents) for name in ("one", "two")]
    one, two = [(folder / "tokenizer.json").read_bytes() for folder in folders]
    assert one == two


def test_little_text_and_a_size_too_small(tmp_path):
    small = AutoTokenizer.from_pretrained(build_tokenizer(tmp_path / "small", ["ab ab", ""]))
    assert 258 <= len(small) < 300
    assert small.decode(small("Ünïcode ab")["input_ids"]) == "Ünïcode ab"
    with pytest.raises(ValueError, match="at least 258"):
        build_tokenizer(tmp_path / "none", ["ab"], vocab_size=257)
    assert not (tmp_path / "none").exists()


def test_a_disk_that_refuses_leaves_no_half_of_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(fault_points, "_reached", {})
    monkeypatch.setenv(fault_points.VARIABLE, "tokenizer.write.after:0:1:enospc")
    with pytest.raises(StorageError, match="cannot write .*small: No space left"):
        build_tokenizer(tmp_path / "small", ["ab ab"])
    assert not list(tmp_path.iterdir())
