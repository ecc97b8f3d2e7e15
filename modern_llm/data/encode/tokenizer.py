"""Token ids of texts: batched encoding, leading special tokens, end token, truncation.

A prompt gets the special tokens that the tokenizer itself puts in front (usually none, or one that
begins a text); an answer gets none but its end token. Where the prompt ends and the answer begins
is found by `boundary`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import UserError
from modern_llm.data.encode.vocabulary import Tokenizer, leading_specials
from modern_llm.data.read.records import ContentFault
from modern_llm.data.table.gaps import Cells, gaps_of, none

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_] | None


class Encoder:
    """Texts to ids, without special tokens but those written in the text itself."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._fast = False
        # The backend alone is a third faster, because no Python list of offsets or masks is made. A
        # tokenizer class may do more than its backend does, so it is asked first.
        if tokenizer.is_fast:
            probe = ["Probe: two  spaces,\n\na 1st “quote”, ünï 漢字", " lead", "trail \n", "a", ""]
            slow = self(probe)
            self._fast = True
            self._fast = all(map(np.array_equal, self(probe), slow))
        self.lead = np.array(leading_specials(tokenizer), dtype=np.int32)

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return one int32 array of ids for each text."""
        if self._fast:
            backend = self._tokenizer.backend_tokenizer
            # A call of the tokenizer elsewhere may have left these set.
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = self._tokenizer.split_special_tokens
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.int32) for ids in found]

    def with_lead(self, ids: Ids) -> Ids:
        """Return `ids` after the leading special tokens, unless they are there already."""
        return ids if self.has_lead(ids) else np.concatenate([self.lead, ids])

    def has_lead(self, ids: Ids) -> bool:
        """Whether `ids` begins with the leading special tokens (true where there are none)."""
        return np.array_equal(ids[: len(self.lead)], self.lead)


@dataclass
class TruncationCounts:
    """Counts of truncated examples and tokens."""

    prompts: int = 0
    responses: int = 0
    tokens: int = 0

    def clear(self) -> None:
        """Count from zero."""
        self.prompts = self.responses = self.tokens = 0


@dataclass(frozen=True)
class Limits:
    """The two lengths of truncation, in tokens.

    Args:
        total: most tokens of prompt and answer together.
        prompt: tokens of the prompt's end that are kept at least where both are too long.
        lead: number of leading special tokens of prompts.
    """

    total: int
    prompt: int
    lead: int = 0

    def __post_init__(self) -> None:
        if self.prompt + self.lead >= self.total:
            raise UserError(
                f"max_prompt_length {self.prompt} (and {self.lead} leading special tokens) leaves "
                f"no token for an answer in max_length {self.total}: lower it or raise max_length"
            )


def default_limits(max_length: int, max_prompt_length: int | None, lead: int) -> Limits:
    """Return the limits; by default the prompt keeps at least half of `max_length`."""
    prompt = max_length // 2 if max_prompt_length is None else max_prompt_length
    if max_prompt_length is None:
        prompt = max(0, min(prompt, max_length - lead - 1))
    return Limits(max_length, prompt, lead)


@dataclass(frozen=True)
class Truncation:
    """Cuts a prompt and its answers to the limits, and adds end tokens (`end`) if `append` is set.

    The cut of the prompt depends on the longest of its answers, so that all of them see the same
    prompt tokens. Leading special tokens survive the cut: models lean on them, and without them the
    cut prompt would look like the middle of a text.
    """

    limits: Limits
    end: int | None
    append: bool = True
    cuts: TruncationCounts = field(default_factory=TruncationCounts)

    def __call__(
        self,
        prompt: Ids,
        responses: Sequence[Ids],
        *,
        has_lead: bool,
        ends: Sequence[int | None] | None = None,
        trained: Sequence[Mask] = (),
    ) -> Cells:
        """Return [prompt, response, ...] within the limits.

        Args:
            prompt: ids with leading special tokens.
            responses: ids without an end token, or with it.
            has_lead: whether the prompt begins with the leading special tokens.
            ends: for each response the id that closes it, None for none; by default the end token,
                where one is to be appended.
            trained: for each response the mask of its ids that are trained on, None for all.

        Raises:
            ContentFault: a response without a target token, or equal responses.
        """
        if ends is None:
            ends = [self.end if self.append else None] * len(responses)
        if any(len(self._without_end(ids)) == 0 for ids in responses):
            raise ContentFault("empty response")
        whole = [self._with_end(ids, end) for ids, end in zip(responses, ends, strict=True)]
        masks = [
            None if mask is None else np.append(mask, [True] * (len(ids) - len(mask)))
            for mask, ids in zip(trained or [None] * len(whole), whole, strict=True)
        ]
        longest = max(map(len, whole))
        kept = self._cut_prompt(prompt, longest, self.limits.lead if has_lead else 0)
        room = self.limits.total - len(kept)
        cut = [
            ids if len(ids) <= room else self._cut_response(ids[:room], end, mask)
            for ids, end, mask in zip(whole, ends, masks, strict=True)
        ]
        gaps = [none(), *(_gaps_in(*pair, len(kept)) for pair in zip(cut, masks, strict=True))]
        if len(cut) > 1 and all(np.array_equal(cut[0], ids) for ids in cut[1:]):
            raise ContentFault("equal responses after truncation")
        self._count(prompt, kept, whole, cut)
        cells = Cells([kept, *cut])
        if any(map(len, gaps)):
            cells.gaps = gaps
        return cells

    def _cut_response(self, ids: Ids, end: int | None, mask: Mask) -> Ids:
        """Return what is left of a cut response, up to its last id that is trained on."""
        if mask is None:
            return self._without_end(ids, end)
        if mask[len(ids)]:  # cut inside an answer: else the answer before is finished
            ids = self._without_end(ids, end)
        return ids[: int(np.flatnonzero(mask[: len(ids)]).max(initial=-1)) + 1]

    def _cut_prompt(self, prompt: Ids, longest: int, lead: int) -> Ids:
        body = len(prompt) - lead
        keep = min(body, max(self.limits.prompt, self.limits.total - lead - longest))
        if keep == body:
            return prompt
        return np.concatenate([prompt[:lead], prompt[lead + body - keep :]])

    def _with_end(self, ids: Ids, end: int | None) -> Ids:
        if end is None or (len(ids) and ids[-1] == end):
            return ids
        return np.append(ids, np.int32(end))

    def _without_end(self, ids: Ids, end: int | None = None) -> Ids:
        """Strip trailing end tokens: a truncated answer must not be trained as a finished one."""
        ends = {self.end, end} - {None}
        size = len(ids)
        while size and int(ids[size - 1]) in ends:
            size -= 1
        return ids[:size]

    def _count(self, prompt: Ids, kept: Ids, whole: list[Ids], cut: list[Ids]) -> None:
        lost = [len(a) - len(b) for a, b in zip(whole, cut, strict=True)]
        self.cuts.prompts += len(kept) < len(prompt)
        self.cuts.responses += sum(map(bool, lost))
        self.cuts.tokens += len(prompt) - len(kept) + sum(lost)


def _gaps_in(ids: Ids, mask: Mask, prompt: int) -> Ids:
    """Return the gaps of a response to a prompt of so many ids.

    Raises:
        ContentFault: no id is a target.
    """
    trained = np.ones(len(ids), bool) if mask is None else mask[: len(ids)].copy()
    if not prompt:
        trained[:1] = True  # never a target, since nothing precedes it: no gap is needed
    if not trained[0 if prompt else 1 :].any():
        raise ContentFault("empty response after truncation")
    return gaps_of(trained)


def tokenizer_identity(tokenizer: Tokenizer | None) -> str:
    """Return a digest of what the tokenizer does to texts, whatever its path."""
    if tokenizer is None:
        return "none"
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = sorted(str(i) for i in tokenizer.all_special_ids)
    parts = [content, str(tokenizer.chat_template), tokenizer.eos_token_id, special]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def check_tokenizers_agree(
    tokenizer_a: Tokenizer, tokenizer_b: Tokenizer, sample_texts: Sequence[str]
) -> None:
    """Require that two tokenizers give the same ids on a sample of the data.

    Raises:
        UserError: they differ; names the first text on which they do, and both ids.
    """
    first, second = Encoder(tokenizer_a), Encoder(tokenizer_b)
    for text, a, b in zip(sample_texts, first(sample_texts), second(sample_texts), strict=True):
        if not np.array_equal(a, b):
            short = min(len(a), len(b))
            at = int(np.argmax(np.append(a[:short] != b[:short], True)))
            found = (
                f"from id number {at} on {a[at : at + 4].tolist()} and {b[at : at + 4].tolist()}"
            )
            raise _disagreement(f"the ids of {text[:60]!r} are {found}")
    if not np.array_equal(first.lead, second.lead):
        raise _disagreement(f"prompts begin with {first.lead.tolist()} and {second.lead.tolist()}")
    ends = tokenizer_a.eos_token_id, tokenizer_b.eos_token_id
    if ends[0] != ends[1]:
        raise _disagreement(f"the end tokens are {ends[0]} and {ends[1]}")


def _disagreement(how: str) -> UserError:
    cure = "leave out tokenizer_name, or name the tokenizer that the checkpoint was trained with"
    return UserError(f"two tokenizers disagree: {how}: {cure}")
