"""Pinned dependencies have no advisory that is known here, and the check notices one that has."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from tools import advisories


def test_no_pinned_dependency_has_a_known_advisory(capsys: pytest.CaptureFixture[str]) -> None:
    assert advisories.main([]) == 0, capsys.readouterr().out


def test_an_affected_pin_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nPython_Multipart==0.0.17\npillow==11.2.1  # older\njinja2==3.1.6\n")
    assert advisories.main(["--constraints", str(constraints)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["pillow 11.2.1", "python-multipart 0.0.17"]
    constraints.write_text("pillow>=11\n")
    with pytest.raises(ValueError, match=r"constraints.txt:1: 'pillow>=11' pins no version"):
        advisories.pinned(constraints)


def test_what_an_audit_reports_is_added_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed, audit = tmp_path / "list.json", tmp_path / "audit.json"
    listed.write_text(json.dumps({"asked": "2020-01-01", "compared": "2020-01-01", "advisories": []}))
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("one==1.0\ntwo==2.0\n")
    arguments = ["--constraints", str(constraints), "--list", str(listed)]
    assert advisories.main(arguments) == 0
    assert "ask a database" in capsys.readouterr().err
    reported = {"id": "PYSEC-1", "fix_versions": ["1.2", "2.1"], "description": "it\nruns code"}
    audit.write_text(
        json.dumps({"dependencies": [{"name": "one", "version": "1.0", "vulns": [reported]}, {"name": "two", "skip_reason": "unknown"}]})
    )
    for _ in range(2):
        assert advisories.main([*arguments, "--add", str(audit)]) == 1
        assert capsys.readouterr().out == "one 1.0: PYSEC-1 (it runs code); affected is <1.2\n"
    written = json.loads(listed.read_text())
    assert (written["asked"], len(written["advisories"])) == (date.today().isoformat(), 1)
