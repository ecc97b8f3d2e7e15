"""Any content of an input file is read or refused: one line, its place, a status, no harm.

Files are read in a process with limited memory. Named damage is tried on every kind of file, then
mutations of good files by Hypothesis.
"""

from __future__ import annotations

import gzip
import shutil
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.trials import SECONDS, Trials, make_seeds

ROWS = ("jsonl", "json", "csv", "parquet", "txt")
KINDS = (
    *ROWS, "yaml", "tokenizer.json", "tokenizer_config.json", "safetensors", "config.json",
    "generation_config.json", "index", "pt", "bin", "manifest", "store manifest", "shard",
)  # fmt: skip
LINED = (*ROWS, "yaml")
"""Kinds whose errors must name the line (Parquet: the row)."""

DEEP = 100_000
PAIR = b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": '
DAMAGE = {
    "empty": b"",
    "white": b" \n\t\r\n ",
    "null": b"null",
    "number": b"-1e999",
    "a list": b"[1, [2], {}]",
    "a string": b'"text"',
    "none in a row": PAIR + b"null}\n",
    "wrong type in a row": PAIR + b"17}\n",
    "list in a row": PAIR + b"[[]]}\n",
    "deep list": b"[" * DEEP,
    "deep closed list": b"[" * DEEP + b"]" * DEEP,
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep value": PAIR + b"[" * DEEP + b"]" * DEEP + b"}\n",
    "deep in an array": b"[" + PAIR + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}]",
    "long line": PAIR + b'"\\n\\nHuman: a\\n\\nAssistant: ' + b"x" * 1_000_000 + b'"}\n',
    "long word": b"x" * 1_000_000,
    "long column": b'{"chos' + b"9" * 5000 + b'en": "a", "rejected": "b"}\n',
    "long number": b"9" * 1_000_000,
    "bad utf-8": PAIR + b'"\xff\xfe\x80"}\n',
    "utf-16": '{"chosen": "a"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + PAIR + b'"\\n\\nHuman: a\\n\\nAssistant: c"}\n',
    "crlf": (PAIR + b'"\\n\\nHuman: a\\n\\nAssistant: c"}\n').replace(b"\n", b"\r\n"),
    "nul": PAIR + b'"\x00"}\n',
    "nul escape": PAIR + b'"\\u0000"}\n',
    "lone surrogate": PAIR + b'"\\ud800"}\n',
    "raw surrogate": PAIR + b'"\xed\xa0\x80"}\n',
    "gzip bomb": gzip.compress(b"\0" * 2**28, 9),
    "zlib bomb": zlib.compress(b"\0" * 2**28, 9),
    "alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in b"bcdefghij"),
    "null for a name": b"data:\n  null: 1\n  dataset_name: x\n",
    "python object": b"train: !!python/object/apply:os.system ['true']\n",
    "huge header": (2**60).to_bytes(8, "little") + b"{}",
    "huge small header": (10**8).to_bytes(8, "little") + b"{}",
    "deep header": (2 * DEEP).to_bytes(8, "little") + b"[" * DEEP + b"]" * DEEP,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def trials(seeds):
    with Trials(seeds) as running:
        yield running


class Case:
    """A copy of the folder of one kind, in which one file is replaced repeatedly."""

    def __init__(self, trials, seeds, kind, folder):
        self._trials, self._kind = trials, kind
        self._intact = seeds[kind].parent
        self.place = folder / "case"
        self._name = seeds[kind].name
        self.seed = seeds[kind].read_bytes()

    def try_(self, content: bytes):
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._intact, self.place)
        path = self.place / self._name
        path.write_bytes(content)
        outcome = self._trials.read(self._kind, path)
        judge(self._kind, path, outcome)
        return outcome


def judge(kind, path, outcome):
    if outcome.status not in (0, 2, 3):
        pytest.fail(outcome.text, pytrace=False)
    assert outcome.seconds < SECONDS, outcome
    if outcome.status == 0:
        return
    assert "\n" not in outcome.text and "Traceback" not in outcome.text
    assert outcome.text.isprintable(), ascii(outcome.text)
    # The folder is named once per problem, and its length is not limited here.
    assert len(outcome.text.replace(str(path.parent), "")) < 1500, outcome.text
    assert str(path.parent) in outcome.text, outcome.text
    if kind in LINED:
        whole = ("nothing", "holds no", "compressed", "Parquet", "no rows", "Missing", "required")
        lined = f"{path}:" in outcome.text or any(word in outcome.text for word in whole)
        assert lined, outcome.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_named_damage(kind, trials, seeds, tmp_path):
    case = Case(trials, seeds, kind, tmp_path)
    assert case.try_(case.seed).status == 0
    wrong = []
    for name, content in DAMAGE.items():
        try:
            case.try_(content)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append(f"{kind}, {name}: {error}")
    assert not wrong, "\n\n".join(wrong)


PIECES = st.sampled_from(
    [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b"\0", b"\xff", b"\xef\xbb\xbf",
     b"\r\n", b"\n", b'"', b"{", b"[", b",", b":", b"\\ud800", b"\\u0000", b"../../x",
     b"9" * 5000, b"[" * 3000, b"&a *a", b"!!python/name:os.system ", b"- ", b"\xed\xa0\x80"]
) | st.binary(max_size=12)  # fmt: skip
PLACE = st.floats(0, 1)
EDIT = st.one_of(
    st.tuples(st.just("put"), PLACE, PIECES),
    st.tuples(st.just("over"), PLACE, PIECES),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 60)),
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("word"), PLACE, PIECES),
    st.tuples(st.just("twice"), PLACE, st.integers(1, 300)),
)
"""Position, as a share of the file, and mutation."""


def mutated(content: bytes, edits) -> bytes:
    for kind, share, what in edits:
        at = int(share * len(content))
        if kind == "put":
            content = content[:at] + what + content[at:]
        elif kind == "over":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "drop":
            content = content[:at] + content[at + what :]
        elif kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "twice":
            content = content[: at + what] + content[at:]
        elif kind == "word":  # a whole value is replaced, so that the syntax stays valid
            begin = content.rfind(b":", 0, at) + 1
            ends = [e for e in (content.find(c, begin) for c in (b",", b"}", b"\n")) if e > 0]
            content = content[:begin] + what + content[min(ends, default=at) :]
    return content


def campaign(kind, trials, seeds, folder, examples):
    case = Case(trials, seeds, kind, folder)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(EDIT, min_size=1, max_size=4))
    def fuzz(edits):
        case.try_(mutated(case.seed, edits))

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_mutations(kind, trials, seeds, tmp_path):
    campaign(kind, trials, seeds, tmp_path, 300)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(kind, trials, seeds, tmp_path):
    campaign(kind, trials, seeds, tmp_path, 10_000)
