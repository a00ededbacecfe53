"""``digits`` with other constants: patched.py [--gate=FOLDER] MODULE.NAME=VALUE ... -- ARGUMENT ...

For tests of limits that a user can not set, such as timeouts of minutes, and of what waits for an
inference, which then waits at a gate of tests/gate.py.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from tests import gate


def main() -> int:
    """Runs the command with the constants set."""
    end = sys.argv.index("--")
    for assignment in sys.argv[1:end]:
        target, _, value = assignment.partition("=")
        if target == "--gate":
            gate.put_up(Path(value))
            continue
        module, _, name = target.rpartition(".")
        owner = importlib.import_module(module)
        assert hasattr(owner, name), target
        setattr(owner, name, json.loads(value))
    from digits.cli.main import main as digits

    return digits(sys.argv[end + 1 :])


if __name__ == "__main__":
    sys.exit(main())
