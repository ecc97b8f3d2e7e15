"""The verb `doctor`: all checks shown, a problem ends in one line and its status."""

from __future__ import annotations

import json

from modern_llm.cli import main
from modern_llm.distributed import build_locks


def test_every_check_is_made_and_shown(run_file, capsys):
    assert main(["doctor", "--config", str(run_file()), "--skip_group", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [check["name"] for check in result["checks"]]
    for part in ("versions", "machine", "cuda", "compilers", "build locks", "hub"):
        assert any(name.startswith(part) for name in names), part
    assert sum(name.startswith("write ") and name.endswith("/out") for name in names) == 1
    assert main(["doctor", "--skip_group"]) == 0
    assert "build locks" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_status_3_with_the_result_before_it(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--output_dir", str(tmp_path / "file" / "out"), "--skip_group", "--json"]
    assert main(["doctor", *words]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["problems"] == 1
    (line,) = err.splitlines()
    assert "Not a directory" in line and "name another folder" in line


def test_a_stale_lock_is_status_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "lock").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_locks, "oldest_compiler", lambda: None)
    assert main(["doctor", "--skip_group"]) == 2
    assert f"remove {tmp_path / 'lock'}" in capsys.readouterr().err


def test_rows_that_processes_cannot_share_are_status_2(run_file, capsys):
    for size, status in ((2, 0), (3, 2)):
        file = run_file(train={"sequence_parallel": size})
        assert main(["doctor", "--config", str(file), "--skip_group", "--json"]) == status
        out, err = capsys.readouterr()
        (check,) = (
            check
            for check in json.loads(out.splitlines()[-1])["checks"]
            if check["name"] == "sequence_parallel"
        )
        assert check["state"] == ("problem" if status else "ok")
    assert "has 4 attention heads, which 3 processes cannot share evenly" in err
