"""Shell completion: a real bash completes verbs and options of the settings themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from modern_llm.cli import VERBS, main
from modern_llm.verbs.completion import whole_parser

ASK = """
source "$1"; shift
function=$(complete -p modern-llm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$function" modern-llm "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$((COMP_CWORD - 1))]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab", reason="the extra `completion` is not installed")
    if shutil.which("bash") is None:
        pytest.skip("no bash to try the script in")
    file = tmp_path_factory.mktemp("completion") / "script"
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["completion", "bash"]) == 0
    file.write_text(out.getvalue())
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["d"], {"demo", "doctor", "dpo"}),
        (["dpo", "--dpo.bet"], {"--dpo.beta"}),
        (["dpo", "--dry"], {"--dry_run", "--dry-run"}),
        (["evaluate", "--ref"], {"--reference"}),
    ],
)
def test_bash_completes(script, words, expected):
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(script), "modern-llm", *words],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert set(done.stdout.split()) == expected, done.stderr


def test_every_verb_is_in_the_parser():
    text = whole_parser(VERBS).format_help()
    assert all(verb.split()[0] in text for verb in VERBS)


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "fish"]) == 2
    assert "fish" in capsys.readouterr().err
