"""Loads a dataclass of settings from flags and environment variables, and documents it.

``grpc_port`` is ``--grpc-port`` and ``DIGITS_GRPC_PORT``. A flag overrides a variable, which
overrides the default. Unknown names are errors, and all errors are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any

ENV_PREFIX = "DIGITS_"
# Variables with this prefix that belong to training and tests, not to the server.
FOREIGN_VARIABLES = frozenset({"DIGITS_DATA"})
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class ConfigError(ValueError):
    """One or more settings are wrong; ``errors`` holds a message for each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def setting(
    default: Any, meaning: str, *, bounds: tuple[float, float] = (0, 0), choices: Sequence[str] = ()
) -> Any:
    """A field: its default, help, and the values that are allowed, bounds included."""
    return field(default=default, metadata={"help": meaning, "bounds": bounds, "choices": choices})


def flag_name(spec: Field[Any]) -> str:
    """``--grpc-port`` for ``grpc_port``."""
    return "--" + spec.name.replace("_", "-")


def variable_name(spec: Field[Any]) -> str:
    """``DIGITS_GRPC_PORT`` for ``grpc_port``."""
    return ENV_PREFIX + spec.name.upper()


def load_values(kind: type, argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The values that were given, by field.

    Args:
        kind: A dataclass of ``setting`` fields of type str, int, float or bool.
        argv: Flags, as ``--name value``, ``--name=value``, ``--switch`` or ``--no-switch``.
        environ: Environment variables; those without ``ENV_PREFIX`` are ignored.

    Raises:
        ConfigError: Naming every unknown name and every bad value.
    """
    errors: list[str] = []
    # Field -> (where it was given, text); flags come last, and override.
    given = {**_from_variables(kind, environ, errors), **_from_flags(kind, argv, errors)}
    values: dict[str, Any] = {}
    for spec in fields(kind):
        if spec.name in given:
            source, text = given[spec.name]
            try:
                values[spec.name] = _parse(spec, text)
            except ValueError as error:
                errors.append(f"{source}: {error}")
    if errors:
        raise ConfigError(errors)
    return values


def _from_variables(
    kind: type, environ: Mapping[str, str], errors: list[str]
) -> dict[str, tuple[str, str]]:
    names = {variable_name(spec): spec.name for spec in fields(kind)}
    ours = {name for name in environ if name.startswith(ENV_PREFIX)} - FOREIGN_VARIABLES
    for name in sorted(ours - names.keys()):
        is_link = environ[name].startswith(("tcp://", "udp://"))
        hint = " (a Kubernetes service link: set enableServiceLinks: false in the pod)"
        errors.append(f"{name}: unknown variable{hint if is_link else ''}")
    return {names[name]: (name, environ[name]) for name in ours & names.keys()}


def _from_flags(kind: type, argv: Sequence[str], errors: list[str]) -> dict[str, tuple[str, str]]:
    specs = {flag_name(spec): spec for spec in fields(kind)}
    switches = {f"--no-{flag[2:]}": s for flag, s in specs.items() if s.type == "bool"}
    given: dict[str, tuple[str, str]] = {}
    tokens = iter(argv)
    for token in tokens:
        flag, equals, text = token.partition("=")
        if flag in switches:
            given[switches[flag].name] = (flag, "a value" if equals else "false")
        elif flag not in specs:
            errors.append(f"{flag}: unknown flag; see digits serve --help")
        else:
            if not equals:
                text = "true" if specs[flag].type == "bool" else _value_after(tokens)
            given[specs[flag].name] = (flag, text)
    return given


def _value_after(tokens: Iterator[str]) -> str:
    """The next token; nothing where a flag follows, which is then lost with the error."""
    value = next(tokens, "")
    return "" if value.startswith("--") else value


def _parse(spec: Field[Any], text: str) -> Any:
    if spec.type == "bool":
        if text.lower() not in BOOLEANS:
            raise ValueError(f"expected true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    if spec.type == "str":
        choices = spec.metadata["choices"]
        if choices and text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        if not text:
            raise ValueError("expected a value, got nothing")
        return text
    kind, noun = (int, "a whole number") if spec.type == "int" else (float, "a number")
    low, high = spec.metadata["bounds"]
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"expected {noun} from {low} to {high}, got {text!r}") from None
    if not low <= value <= high:
        raise ValueError(f"expected {noun} from {low} to {high}, got {text}")
    return value


def help_text(kind: type) -> str:
    """The settings part of ``digits serve --help``."""
    lines = []
    for spec in fields(kind):
        flag, default = flag_name(spec), _default(spec)
        both = f"{flag}/--no-{flag[2:]}" if spec.type == "bool" else flag
        shown = f" (default {default})" if default else ""
        lines.append(f"  {both}\n      {_meaning(spec)}{shown} [{variable_name(spec)}]")
    return "\n".join(lines)


def markdown_table(kind: type) -> str:
    """The table of settings in the docs."""
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for spec in fields(kind):
        default = f"`{_default(spec)}`" if _default(spec) else ""
        rows.append(
            f"| `{flag_name(spec)}` | `{variable_name(spec)}` | {default} | {_meaning(spec)} |"
        )
    return "\n".join(rows)


def _meaning(spec: Field[Any]) -> str:
    choices = spec.metadata["choices"]
    said = f": {', '.join(choices)}" if choices else ""
    return f"{spec.metadata['help']}{said}"


def _default(spec: Field[Any]) -> str:
    return str(spec.default).lower() if spec.type == "bool" else str(spec.default)
