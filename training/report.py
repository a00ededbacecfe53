"""The folder that every run leaves: metrics, pictures, and one page that holds them all."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from training import pictures
from training.checkpoint import Checkpoint
from training.data import Split
from training.model import parameter_count

CAPTIONS = {
    "curves": "Loss and accuracy of each epoch",
    "confusion": "Truth against prediction on the validation images",
    "misclassified": "Validation digits that were read wrong, the most confident first",
    "filters": "Kernels of the first convolution",
    "features": "A validation digit on its way through the layers",
    "reliability": "Accuracy against confidence",
    "corruptions": "Accuracy on corrupted validation images",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid #ddd; } img { max-width: 100%; } figure { margin: 2rem 0; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
"""


def write_report(checkpoint: Checkpoint, validation: Split, folder: Path) -> None:
    """Writes metrics.json, a PNG for each picture, and report.html, which needs no other file.

    Args:
        checkpoint: What the run made.
        validation: Images that it was not trained on; may be empty.
        folder: Of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = checkpoint.metrics
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    drawn = {
        "curves": pictures.curves(metrics["history"]),
        "filters": pictures.filters(checkpoint.model),
    }
    if held := metrics.get("validation"):
        drawn |= {
            "confusion": pictures.confusion(held["confusion"]),
            "misclassified": pictures.misclassified(checkpoint.model, validation),
            "features": pictures.feature_maps(checkpoint.model, validation.images[0]),
            "reliability": pictures.reliability(held["calibration"]),
            "corruptions": pictures.corruption_bars(held["corruptions"]),
        }
    shown = {name: data for name, data in drawn.items() if data is not None}
    for name, data in shown.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "report.html").write_text(_page(checkpoint, shown))


def _page(checkpoint: Checkpoint, shown: dict[str, bytes]) -> str:
    title = f"{checkpoint.config.arch} on {checkpoint.config.dataset}"
    figures = "".join(
        f"<figure><figcaption>{html.escape(CAPTIONS[name])}</figcaption>"
        f'<img alt="{html.escape(CAPTIONS[name])}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
        for name, data in shown.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{_table(summary(checkpoint))}"
        f"{figures}<h2>Configuration</h2>{_table(checkpoint.config.to_dict())}</html>\n"
    )


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The figures that matter, for people."""
    metrics = checkpoint.metrics
    lines = {}
    if held := metrics.get("validation"):
        low, high = held["accuracy_ci95"]
        lines = {
            "validation accuracy": f"{held['accuracy']:.2%} of {held['images']:,} images "
            f"(95 % interval {low:.2%} to {high:.2%})",
            "negative log likelihood": f"{held['nll']:.4f}",
            "expected calibration error": f"{held['ece']:.4f}",
        }
    if others := (held or {}).get("not_digits"):
        passing = [
            f"{share:.1%} of {kind}" for kind, share in others.items() if kind != "threshold"
        ]
        score = f"{others['threshold']:.3f}, which 99 % of digits reach"
        lines["taken for a digit"] = f"{', '.join(passing)}, at a score of {score}"
    return {
        **lines,
        **metrics.get("before_and_after", {}),
        "temperature": f"{metrics['temperature']:.3f}",
        "parameters": f"{parameter_count(checkpoint.model):,}",
        "training time": f"{metrics['train_seconds']:.0f} s",
        "selection": metrics["selection"],
        "source commit": checkpoint.source_commit,
    }


def _table(rows: dict[str, Any]) -> str:
    cells = (
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"
