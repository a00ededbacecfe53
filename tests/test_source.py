"""What the source never does: run code from data, or unpickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT

FOLDERS = ("service", "training", "export", "benchmarks", "proto/digits")
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}


def sources() -> list[Any]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def offences(source: Any) -> list[Any]:
    """Lines that could run code from data: evaluators, picklers, loads that unpickle, shells."""
    nodes: Iterator[Any] = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if _is_offence(node)]


def _is_offence(node: Any) -> Any:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in PICKLERS for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        picklers = (node.module or "").split(".")[0] in PICKLERS
        # Called by a bare name, torch's load would not be recognised below.
        return picklers or ((node.module or "").startswith("torch") and "load" in names)
    if not isinstance(node, ast.Call):
        return False
    function, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
    if function in EVALUATORS:
        return True
    if function in ("torch.load", "torch.jit.load", "torch.package.PackageImporter"):
        return not _is(keywords.get("weights_only"), True)
    if function in ("np.load", "numpy.load") and len(node.args) > 1:  # could be allow_pickle
        return True
    if "allow_pickle" in keywords:
        return not _is(keywords["allow_pickle"], False)
    return "shell" in keywords and not _is(keywords["shell"], False)


def _is(value: Any, wanted: Any) -> Any:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "np.load(path, None, True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_offence_is_found(source: str) -> None:
    assert offences(f"\n{source}\n") == [2]


def test_source_runs_no_code_from_data() -> None:
    found = {str(p.relative_to(ROOT)): offences(p.read_text()) for p in sources()}
    assert len(found) > 50
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_checkpoints_are_loaded() -> None:
    """Else the rule about ``torch.load`` would be about nothing."""
    assert any("torch.load(" in path.read_text() for path in sources())
