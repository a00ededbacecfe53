"""Every setting of the server, declared once: default, bounds, help.

Flags, environment variables, ``--help`` and docs/settings.md are made from this table; see
``settings.py``. A number that nobody should change is a constant where it is used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.settings import ConfigError, load_values, setting

DAY_S = 86_400
WANTED = re.compile(r"(0|[1-9][0-9]{0,9})(\+?)")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of one server process; see each field's help."""

    host: str = setting(
        "127.0.0.1", "address that gRPC and HTTP listen on; 0.0.0.0 is IPv4, :: IPv4 and IPv6"
    )
    grpc_port: int = setting(
        50051, "gRPC port; 0 picks a free port, and prints it", bounds=(0, 65535)
    )
    http_port: int = setting(
        8080, "HTTP port of /metrics, /healthz and /livez; 0 picks a free port", bounds=(0, 65535)
    )
    model_repository: str = setting(
        "",
        "folder that holds the model's releases; by default the model that is installed with the "
        "server, or that of the clone in an editable installation",
    )
    model_version: str = setting(
        "0",
        "release to serve and no other; 0 serves the promoted one, else the highest valid one, and "
        "3+ the same, but none below 3",
    )
    model_public_key: str = setting(
        "",
        "PEM file of an Ed25519 public key: releases and promotions without its signature are "
        "rejected",
    )
    precision: str = setting(
        "auto",
        "which model of a release serves; auto takes int8 on the CPU and fp32 on CUDA, and the "
        "other one if that is missing or invalid",
        choices=("auto", "fp32", "int8"),
    )
    device: str = setting(
        "auto",
        "where inference runs; cuda fails to start without a working CUDA provider",
        choices=("auto", "cpu", "cuda"),
    )
    transport: str = setting(
        "http2",
        "gRPC implementation; grpcio is a reference for trusted callers, and does not bound bytes",
        choices=("http2", "grpcio"),
    )
    max_batch_size: int = setting(
        64, "images in a batch at most; small requests get smaller ones", bounds=(1, 4096)
    )
    max_queue_images: int = setting(
        2048, "images that may wait; further ones are rejected", bounds=(1, 1_000_000)
    )
    max_images_per_request: int = setting(4096, "images in a request at most", bounds=(1, 100_000))
    instances: int = setting(
        0, "inferences that run concurrently; 0 takes the CPU quota", bounds=(0, 256)
    )
    intra_op_threads: int = setting(1, "threads inside one inference", bounds=(1, 256))
    reload_interval_s: float = setting(
        5.0,
        "seconds between polls of the model repository; 0 polls on SIGHUP only",
        bounds=(0, DAY_S),
    )
    drain_delay_s: float = setting(
        0.0, "seconds between NOT_SERVING and the drain, for balancers to notice", bounds=(0, 3600)
    )
    grace_s: float = setting(
        20.0, "seconds that calls in flight get to finish in a drain", bounds=(0, 3600)
    )
    max_connection_age_s: float = setting(
        0.0,
        "seconds after which a connection gets GOAWAY, so that callers reconnect and load spreads "
        "over new servers; 0 never",
        bounds=(0, DAY_S),
    )
    tls_cert: str = setting("", "PEM file of the certificate chain; turns on TLS of the gRPC port")
    tls_key: str = setting("", "PEM file of its private key, unencrypted")
    tls_client_ca: str = setting(
        "", "PEM file of CA certificates: callers need a certificate from one of them (mutual TLS)"
    )
    auth_token_file: str = setting(
        "", "file of bearer tokens, one TOKEN or NAME:TOKEN a line: every call needs one"
    )
    rate_limit_images_per_s: int = setting(
        0,
        "images a second for each token, with a burst of one second's worth; 0 is no limit",
        bounds=(0, 1_000_000_000),
    )
    request_log_per_s: float = setting(
        1.0,
        "log lines a second for RPCs that succeeded, and as many for failed ones; 0 writes none",
        bounds=(0, 10_000),
    )
    sample_dir: str = setting(
        "", "folder that keeps a sample of the images that are classified, to label and train with"
    )
    sample_per_s: int = setting(1, "images that are kept of each second", bounds=(1, 1000))
    otlp_endpoint: str = setting(
        "", "OTLP/gRPC collector of traces, such as http://127.0.0.1:4317; OTEL_* variables apply"
    )
    log_format: str = setting("text", "format of log lines", choices=("text", "json"))
    reflection: bool = setting(True, "serve gRPC reflection")
    playground: bool = setting(
        False, "serve a page to draw digits on (/draw) and POST /v1/classify on the HTTP port"
    )


def model_repository(config: ServerConfig) -> Path:
    """Where the model's releases are: the setting, else what the wheel or the clone holds."""
    if config.model_repository:
        return Path(config.model_repository)
    package = Path(__file__).parent
    packaged = package / "models/digits"
    return packaged if packaged.is_dir() else package.parent / "models/digits"


def wanted_releases(config: ServerConfig) -> range:
    """The numbers that ``--model-version`` allows.

    Raises:
        ValueError: If it is malformed.
    """
    found = WANTED.fullmatch(config.model_version)
    if found is None or found[0] == "0+":
        expected = "0, the number of a release, or a number and +"
        raise ValueError(f"expected {expected}, got {config.model_version!r}")
    number, is_open = int(found[1]), not int(found[1]) or bool(found[2])
    return range(number, sys.maxsize if is_open else number + 1)


def load_config(argv: Sequence[str], environ: Mapping[str, str]) -> ServerConfig:
    """The configuration from flags and environment variables.

    Raises:
        ConfigError: Naming everything that is wrong.
    """
    config = ServerConfig(**load_values(ServerConfig, argv, environ))
    if contradictions := _contradictions(config):
        raise ConfigError(contradictions)
    return config


def _contradictions(config: ServerConfig) -> list[str]:
    """Settings that are no release, or each valid, but not together."""
    errors = []
    try:
        wanted_releases(config)
    except ValueError as error:
        errors.append(f"--model-version: {error}")
    if bool(config.tls_cert) != bool(config.tls_key):
        given, lacking = ("cert", "key") if config.tls_cert else ("key", "cert")
        errors.append(f"--tls-{given}: expected --tls-{lacking} beside it, got none")
    if config.tls_client_ca and not config.tls_cert:
        errors.append("--tls-client-ca: expected --tls-cert and --tls-key beside it, got none")
    if config.tls_client_ca and config.playground:
        errors.append(
            "--tls-client-ca: expected no --playground beside it: the HTTP port asks nobody for a "
            "certificate"
        )
    if config.rate_limit_images_per_s and not config.auth_token_file:
        errors.append(
            "--rate-limit-images-per-s: expected --auth-token-file, to tell callers by, got none"
        )
    return errors
