"""``digits classify``: asks a server about image files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from digits.client import DEFAULT_ADDRESS, Classification, DigitClient, DigitError, Tls
from service.security.rotation import CredentialError
from service.security.tokens import first_token


def classify_files(argv: list[str]) -> int:
    """Prints a prediction for each file; returns 0, 1 if the call failed, 2 if misused."""
    parser = argparse.ArgumentParser(
        prog="digits classify", description="Classifies image files of one digit each."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="PNG, JPEG, WebP or BMP")
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, help=f"host:port (default {DEFAULT_ADDRESS})"
    )
    parser.add_argument("--timeout-s", type=float, default=10.0, help="deadline (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tls-ca", metavar="FILE", help="PEM roots of the server's certificate")
    parser.add_argument("--tls-cert", metavar="FILE", help="PEM certificate to show (mutual TLS)")
    parser.add_argument("--tls-key", metavar="FILE", help="PEM private key of --tls-cert")
    parser.add_argument("--token-file", metavar="FILE", help="shows the first token in it")
    arguments = parser.parse_args(argv)
    try:
        with _client(parser, arguments) as client:
            answer = client.classify_files(arguments.files)
    except ValueError as error:
        parser.error(str(error))
    except (OSError, CredentialError, DigitError) as error:
        print(f"digits classify: {_explain(error, arguments.files)}", file=sys.stderr)
        return 1
    print(
        _as_json(arguments.files, answer) if arguments.json else _as_table(arguments.files, answer)
    )
    return 0


def _client(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> DigitClient:
    tls = None
    if arguments.tls_ca:
        tls = Tls(ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key)
    elif arguments.tls_cert or arguments.tls_key:
        parser.error("--tls-cert and --tls-key: expected --tls-ca beside them, got none")
    token = first_token(Path(arguments.token_file)) if arguments.token_file else None
    return DigitClient(arguments.address, timeout_s=arguments.timeout_s, tls=tls, token=token)


def _explain(error: OSError | CredentialError | DigitError, files: list[str]) -> str:
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
