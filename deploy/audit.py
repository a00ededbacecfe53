"""``make audit``: looks locked packages up in a database of known vulnerabilities, by pip-audit.

pip-audit calls a package that its database does not answer for "skipped" and is content; here that
is no success. Exit code: 0 every package was looked up and nothing is known, 1 something is known,
2 packages were not looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

PIP_AUDIT = "pip-audit~=2.10"


def main(locks: list[str]) -> int:
    """Audits each lock and prints what was found."""
    return max([_report(lock, _audit(lock)) for lock in locks], default=2)


def _audit(lock: str) -> list[dict[str, Any]] | str:
    """What pip-audit says of each package, or why it says nothing."""
    uvx = str(Path(sysconfig.get_path("scripts"), "uvx"))
    command = [uvx, "--quiet", PIP_AUDIT, "--disable-pip", "--require-hashes", "--format=json"]
    command += ["--progress-spinner=off", "-r", lock]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
    return packages


def _report(lock: str, packages: list[dict[str, Any]] | str) -> int:
    if isinstance(packages, str):
        print(f"{lock}: NOT AUDITED: {packages}")
        return 2
    known = [(p, vulnerability) for p in packages for vulnerability in p.get("vulns", [])]
    for package, vulnerability in known:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
        where = f"{lock}: {package['name']} {package['version']}"
        print(f"{where}: {vulnerability['id']}, fixed in {fixed}")
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    if skipped:
        reason = "no vulnerability database that can be reached from here answered for them"
        print(f"{lock}: NOT AUDITED: {len(skipped)} of {len(packages)} packages: {reason}")
    if known:
        return 1
    if not skipped:
        print(f"{lock}: {len(packages)} packages, no known vulnerability")
    return 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
