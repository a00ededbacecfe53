"""``digits classify``: asks a server about image files."""

from __future__ import annotations

import argparse
import json
import sys

from digits.client import DEFAULT_ADDRESS, Classification, DigitClient, DigitError


def classify_files(argv: list[str]) -> int:
    """Prints a prediction for each file; returns 0, 1 if the call failed, 2 if misused."""
    parser = argparse.ArgumentParser(
        prog="digits classify", description="Classifies image files of 28x28 pixels."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="PNG, JPEG, WebP or BMP")
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, help=f"host:port (default {DEFAULT_ADDRESS})"
    )
    parser.add_argument("--timeout-s", type=float, default=10.0, help="deadline (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    try:
        with DigitClient(arguments.address, timeout_s=arguments.timeout_s) as client:
            answer = client.classify_files(arguments.files)
    except ValueError as error:
        parser.error(str(error))
    except (OSError, DigitError) as error:
        print(f"digits classify: {_explain(error, arguments.files)}", file=sys.stderr)
        return 1
    print(
        _as_json(arguments.files, answer) if arguments.json else _as_table(arguments.files, answer)
    )
    return 0


def _explain(error: OSError | DigitError, files: list[str]) -> str:
    """The error with the file's name where the server could only know its place in the request."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    message = str(error)
    for index, name in enumerate(files):
        message = message.replace(f"encoded.files[{index}]", name)
    return message


def _as_table(files: list[str], answer: Classification) -> str:
    width = max(len("file"), *(len(name) for name in files))
    lines = [f"{'file':<{width}}  digit  confidence  runner-up"]
    for name, prediction in zip(files, answer.predictions, strict=True):
        second = int(prediction.probabilities.argsort()[-2])
        runner_up = f"{second} ({prediction.probabilities[second]:.2%})"
        lines.append(
            f"{name:<{width}}  {prediction.digit:>5}  {prediction.confidence:>10.2%}  {runner_up}"
        )
    model = answer.model
    lines.append(
        f"\nmodel {model.name}/{model.version} {model.precision} {model.sha256[:12]} on "
        f"{model.execution_provider}, inference {answer.inference_us} us"
    )
    return "\n".join(lines)


def _as_json(files: list[str], answer: Classification) -> str:
    predictions = [
        {
            "file": name,
            "digit": prediction.digit,
            "confidence": prediction.confidence,
            "probabilities": [float(p) for p in prediction.probabilities],
        }
        for name, prediction in zip(files, answer.predictions, strict=True)
    ]
    return json.dumps({"predictions": predictions, "model": vars(answer.model)}, indent=2)
