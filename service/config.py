"""Every setting of the server, declared once: default, bounds, help, flag, variable, README row.

Precedence: default < environment variable < flag. Unknown names are errors; all errors
are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

ENV_PREFIX = "DIGITS_"
# Variables with our prefix that belong to training and tests, not to the server.
FOREIGN_VARIABLES = frozenset({"DIGITS_DATA"})


class ConfigError(ValueError):
    """One or more settings are wrong; ``errors`` holds a message for each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def _setting(
    default: Any,
    meaning: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    metadata = {"help": meaning, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings of one server process; see each field's help."""

    host: str = _setting("127.0.0.1", "address to listen on, for gRPC and HTTP")
    http_host: str = _setting("", "address of the HTTP port, where it is another than --host")
    grpc_port: int = _setting(
        50051, "gRPC port; 0 picks a free one and prints it", minimum=0, maximum=65535
    )
    http_port: int = _setting(
        8080, "HTTP port of /metrics and /healthz; 0 picks a free one", minimum=0, maximum=65535
    )
    http_classify: bool = _setting(False, "serve POST /v1/classify on the HTTP port, to try it")
    http_classify_rate: float = _setting(
        20.0,
        "requests a second that one address may send to /v1/classify",
        minimum=0.1,
        maximum=100_000,
    )
    playground: bool = _setting(
        False, "serve /draw on the HTTP port, a page to draw on; turns --http-classify on"
    )
    model_repository: str = _setting("models/digits", "folder that holds the model's versions")
    model_version: int = _setting(
        0,
        "version to pin; 0 serves the promoted one, or the highest that is valid",
        minimum=0,
        maximum=2**31 - 1,
    )
    model_public_key: str = _setting(
        "",
        "PEM file of the Ed25519 key that must have signed a version; without it none is asked for",
    )
    device: str = _setting(
        "auto",
        "where inference runs; cuda fails to start without a working CUDA provider",
        choices=("auto", "cpu", "cuda"),
    )
    transport: str = _setting(
        "http2",
        "what carries RPCs; grpcio is for trusted callers: it bounds calls, not their bytes",
        choices=("http2", "grpcio"),
    )
    max_batch_size: int = _setting(
        64,
        "images in one batch at most; the server takes fewer where a batch would take too long",
        minimum=1,
        maximum=4096,
    )
    max_queue_images: int = _setting(
        2048, "images that may wait; more are refused", minimum=1, maximum=1_000_000
    )
    max_images_per_request: int = _setting(
        4096, "images in one request at most", minimum=1, maximum=100_000
    )
    max_streams: int = _setting(
        256,
        "ClassifyStream calls open at the same time; more are refused",
        minimum=1,
        maximum=100_000,
    )
    stream_idle_s: float = _setting(
        300.0,
        "seconds that a stream may neither send a request nor take an answer; 0 allows any",
        minimum=0,
        maximum=86_400,
    )
    max_connections: int = _setting(
        0,
        "connections at the same time; 0 takes half of the file descriptors, 10,000 at most",
        minimum=0,
        maximum=1_000_000,
    )
    keepalive_s: float = _setting(
        60.0,
        "idle seconds before the server sends a keepalive ping",
        minimum=1,
        maximum=86_400,
    )
    keepalive_timeout_s: float = _setting(
        20.0, "seconds for the answer to it, or the connection is closed", minimum=0.1, maximum=3600
    )
    max_connection_age_s: float = _setting(
        0.0,
        "seconds after which a connection is asked to go, so that load spreads over new servers; "
        "0 never asks",
        minimum=0,
        maximum=86_400,
    )
    intra_op_threads: int = _setting(1, "threads inside one inference", minimum=1, maximum=256)
    instances: int = _setting(
        0, "inferences at the same time; 0 takes the CPU quota", minimum=0, maximum=256
    )
    reload_interval_s: float = _setting(
        5.0,
        "seconds between looks for another version to serve; 0 looks on SIGHUP only",
        minimum=0,
        maximum=86_400,
    )
    golden_interval_s: float = _setting(
        60.0,
        "seconds between checks of the golden digits on the model in service; 0 makes none",
        minimum=0,
        maximum=86_400,
    )
    stall_timeout_s: float = _setting(
        10.0, "seconds after which an inference counts as stuck", minimum=0.1, maximum=3600
    )
    drain_delay_s: float = _setting(
        0.0, "seconds between NOT_SERVING and refusing calls", minimum=0, maximum=3600
    )
    grace_s: float = _setting(
        20.0, "seconds that calls in flight get to finish", minimum=0, maximum=3600
    )
    request_log_per_s: float = _setting(
        1.0,
        "log lines a second for RPCs that ended well, and as many for others; 0 writes none",
        minimum=0,
        maximum=10_000,
    )
    otlp_endpoint: str = _setting(
        "",
        "OTLP/gRPC collector that gets traces, such as http://127.0.0.1:4317; the OTEL_* variables "
        "apply",
    )
    tls_cert: str = _setting(
        "", "PEM file of the certificate chain; with it the gRPC port speaks TLS"
    )
    tls_key: str = _setting("", "PEM file of its private key, unencrypted")
    tls_client_ca: str = _setting(
        "", "PEM file of the roots of callers' certificates; with it every caller needs one"
    )
    auth_token_file: str = _setting(
        "", "file of bearer tokens, one TOKEN or NAME:TOKEN a line; with it every call needs one"
    )
    rate_limit_images_per_s: int = _setting(
        0,
        "images a second that each name or token may ask for, one second's worth at once; "
        "0 is no limit",
        minimum=0,
        maximum=1_000_000_000,
    )
    log_format: str = _setting("text", "form of the log lines", choices=("text", "json"))
    reflection: bool = _setting(True, "serve gRPC reflection")
    oip: bool = _setting(
        True, "serve the Open Inference Protocol (KServe, Triton's clients) on the gRPC port"
    )

    @property
    def classifies_over_http(self) -> bool:
        """Whether the HTTP port answers calls too."""
        return self.http_classify or self.playground


def flag_name(setting: Field[Any]) -> str:
    """``grpc_port`` is ``--grpc-port``."""
    return "--" + setting.name.replace("_", "-")


def variable_name(setting: Field[Any]) -> str:
    """``grpc_port`` is ``DIGITS_GRPC_PORT``."""
    return ENV_PREFIX + setting.name.upper()


def load_config(argv: Sequence[str], environ: Mapping[str, str]) -> ServerConfig:
    """Builds the configuration from flags and environment variables.

    Args:
        argv: Flags, as ``--name value``, ``--name=value``, ``--switch`` or ``--no-switch``.
        environ: Environment variables; those without our prefix are ignored.

    Raises:
        ConfigError: Naming every unknown name and every bad value at once.
    """
    settings = fields(ServerConfig)
    errors: list[str] = []
    # Field name -> (where it was said, text), the stronger source last.
    given = {**_read_variables(environ, errors), **_read_flags(argv, errors)}
    values: dict[str, Any] = {}
    for setting in settings:
        if setting.name in given:
            source, text = given[setting.name]
            try:
                values[setting.name] = _parse(setting, text)
            except ValueError as error:
                errors.append(f"{source}: {error}")
    if errors:
        raise ConfigError(errors)
    config = ServerConfig(**values)
    if contradictions := _contradictions(config):
        raise ConfigError(contradictions)
    return config


def _contradictions(config: ServerConfig) -> list[str]:
    """What is wrong with settings that are right each by itself."""
    errors = []
    if bool(config.tls_cert) != bool(config.tls_key):
        given, lacking = ("cert", "key") if config.tls_cert else ("key", "cert")
        errors.append(f"--tls-{given}: expected --tls-{lacking} beside it, got none")
    if config.tls_client_ca and not config.tls_cert:
        errors.append("--tls-client-ca: expected --tls-cert and --tls-key beside it, got none")
    if config.tls_client_ca and config.classifies_over_http:
        errors.append(
            "--tls-client-ca: expected neither --http-classify nor --playground beside it, got "
            "one, and the HTTP port asks nobody for a certificate"
        )
    if config.rate_limit_images_per_s and not config.auth_token_file:
        errors.append(
            "--rate-limit-images-per-s: expected --auth-token-file, to tell callers by, got none"
        )
    return errors


def _read_variables(environ: Mapping[str, str], errors: list[str]) -> dict[str, tuple[str, str]]:
    by_variable = {variable_name(s): s for s in fields(ServerConfig)}
    given = {}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in FOREIGN_VARIABLES:
            continue
        if name in by_variable:
            given[by_variable[name].name] = (name, environ[name])
        else:
            errors.append(f"{name}: unknown variable{_kubernetes_hint(environ[name])}")
    return given


def _kubernetes_hint(value: str) -> str:
    if value.startswith(("tcp://", "udp://")):
        return " (a Kubernetes service link: set enableServiceLinks: false in the pod)"
    return ""


def _read_flags(argv: Sequence[str], errors: list[str]) -> dict[str, tuple[str, str]]:
    by_flag = {flag_name(s): s for s in fields(ServerConfig)}
    given: dict[str, tuple[str, str]] = {}
    tokens = iter(argv)
    for token in tokens:
        flag, equals, text = token.partition("=")
        switched_off = by_flag.get("--" + flag.removeprefix("--no-"))
        if flag in by_flag:
            setting = by_flag[flag]
            if not equals:
                text = "true" if setting.type == "bool" else _value_after(tokens)
            given[setting.name] = (flag, text)
        elif flag.startswith("--no-") and switched_off and switched_off.type == "bool":
            given[switched_off.name] = (flag, "a value" if equals else "false")
        else:
            errors.append(f"{flag}: unknown flag; see digits serve --help")
    return given


def _value_after(tokens: Iterator[str]) -> str:
    """The next token; nothing where a flag follows, which is then lost with the error."""
    value = next(tokens, "")
    return "" if value.startswith("--") else value


def _parse(setting: Field[Any], text: str) -> Any:
    """The setting's value from text, in its type and bounds, or ValueError."""
    if setting.type == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() in ("true", "1")
    if setting.type == "str":
        choices = setting.metadata["choices"]
        if choices and text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        if not text:
            raise ValueError("expected a value, got nothing")
        return text
    kind = {"int": int, "float": float}[str(setting.type)]
    bounds = f"from {setting.metadata['minimum']} to {setting.metadata['maximum']}"
    noun = "a whole number" if kind is int else "a number"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"expected {noun} {bounds}, got {text!r}") from None
    if not setting.metadata["minimum"] <= value <= setting.metadata["maximum"]:
        raise ValueError(f"expected {noun} {bounds}, got {text}")
    return value


def help_text() -> str:
    """The settings part of ``digits serve --help``."""
    lines = []
    for setting in fields(ServerConfig):
        flag = flag_name(setting)
        if setting.type == "bool":
            flag = f"{flag}/--no-{flag[2:]}"
        lines.append(f"  {flag}\n      {_described(setting)} [{variable_name(setting)}]")
    return "\n".join(lines)


def markdown_table() -> str:
    """The README's table of settings."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for setting in fields(ServerConfig):
        default = f"`{_default(setting)}`" if _default(setting) else ""
        meaning = setting.metadata["help"] + _choices(setting)
        rows.append(
            f"| `{flag_name(setting)}` | `{variable_name(setting)}` | {default} | {meaning} |"
        )
    return "\n".join(rows)


def _described(setting: Field[Any]) -> str:
    default = _default(setting)
    said = f" (default {default})" if default else ""
    return f"{setting.metadata['help']}{_choices(setting)}{said}"


def _default(setting: Field[Any]) -> str:
    return str(setting.default).lower() if setting.type == "bool" else str(setting.default)


def _choices(setting: Field[Any]) -> str:
    choices = setting.metadata["choices"]
    return f": {', '.join(choices)}" if choices else ""
