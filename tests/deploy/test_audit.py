"""The look-up of known vulnerabilities never takes silence for good news."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = ROOT / "deploy/audit.py"
LOCK = ROOT / "deploy/requirements-cpu.lock"


def test_audit_without_a_database_says_so_and_does_not_succeed():
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:1", "UV_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, LOCK], capture_output=True, text=True, check=False,
        env={**os.environ, **nowhere}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{LOCK}: NOT AUDITED: " in done.stdout


def test_known_vulnerability_is_named_and_fails(capsys):
    """The form of pip-audit 2.10's JSON."""
    report = runpy.run_path(str(SCRIPT))["_report"]
    good = {"name": "numpy", "version": "2.4.6", "vulns": []}
    flaw = {"id": "PYSEC-2023-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
    bad = {"name": "pillow", "version": "1.0", "vulns": [flaw]}
    unknown = {"name": "uvloop", "skip_reason": "not found"}
    assert report("lock", [good]) == 0
    assert report("lock", [good, unknown]) == 2
    assert report("lock", [good, bad, unknown]) == 1
    assert "pillow 1.0: PYSEC-2023-1, fixed in 2.0" in capsys.readouterr().out
