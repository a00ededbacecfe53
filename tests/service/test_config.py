from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from service.config import ServerConfig, load_config, model_repository, wanted_releases
from service.settings import ConfigError, flag_name, help_text, markdown_table, variable_name

ROOT = Path(__file__).parents[2]


def errors_of(argv: Any, environ: Any = None) -> Any:
    with pytest.raises(ConfigError) as caught:
        load_config(argv, environ or {})
    return caught.value.errors


def test_nothing_given_yields_the_defaults() -> None:
    assert load_config([], {"PATH": "/bin"}) == ServerConfig()


def test_flag_wins_over_variable_which_wins_over_default() -> None:
    environ = {"DIGITS_GRPC_PORT": "1", "DIGITS_HTTP_PORT": "2"}
    config = load_config(["--grpc-port", "3"], environ)
    assert (config.grpc_port, config.http_port) == (3, 2)


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["--reflection"], {}, True),
        (["--no-reflection"], {}, False),
        (["--reflection=false"], {}, False),
        ([], {"DIGITS_REFLECTION": "false"}, False),
        ([], {"DIGITS_REFLECTION": "True"}, True),
        (["--reflection"], {"DIGITS_REFLECTION": "0"}, True),
    ],
)
def test_switch_is_read_in_every_spelling(argv: Any, environ: Any, expected: bool) -> None:
    assert load_config(argv, environ).reflection is expected


def test_all_errors_are_reported_at_once() -> None:
    errors = errors_of(
        ["--grpc-port=seven", "--bogus", "--device", "tpu", "--no-grpc-port"],
        {"DIGITS_MAX_BATCH_SIZE": "0", "DIGITS_TYPO": "1"},
    )
    assert errors == [
        "DIGITS_TYPO: unknown variable",
        "--bogus: unknown flag; see digits serve --help",
        "--no-grpc-port: unknown flag; see digits serve --help",
        "--grpc-port: expected a whole number from 0 to 65535, got 'seven'",
        "--device: expected one of auto, cpu, cuda, got 'tpu'",
        "DIGITS_MAX_BATCH_SIZE: expected a whole number from 1 to 4096, got 0",
    ]


def test_service_link_of_kubernetes_is_explained() -> None:
    [error] = errors_of([], {"DIGITS_PORT": "tcp://10.0.0.1:50051"})
    assert "enableServiceLinks: false" in error


def test_value_on_a_switch_that_turns_off_is_an_error() -> None:
    assert "expected true or false" in errors_of(["--no-reflection=false"])[0]


def test_flag_in_place_of_a_value_is_not_swallowed() -> None:
    assert errors_of(["--host", "--bogus"])[-1] == "--host: expected a value, got nothing"


def test_value_that_is_missing_or_not_finite_is_an_error() -> None:
    assert errors_of(["--host"]) == ["--host: expected a value, got nothing"]
    assert "got nan" in errors_of(["--grace-s", "nan"])[0]


def test_variable_of_training_is_not_the_servers_business() -> None:
    assert load_config([], {"DIGITS_DATA": "/data"}) == ServerConfig()


def test_every_setting_is_in_help_and_readme() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    assert markdown_table(ServerConfig) in page, "the table of settings is stale"
    for setting in fields(ServerConfig):
        assert flag_name(setting) in help_text(ServerConfig)
        assert variable_name(setting) in help_text(ServerConfig)


def test_model_of_the_clone_is_served_by_default() -> None:
    """In an editable installation; tests/test_wheels.py serves the one in the wheel."""
    assert model_repository(load_config([], {})) == ROOT / "models/digits"
    assert model_repository(load_config(["--model-repository=else"], {})) == Path("else")


TLS = ["--tls-cert=cert.pem", "--tls-key=key.pem"]
WITHOUT_CERTIFICATE = (
    "--tls-client-ca: expected no --playground beside it: the HTTP port asks nobody for a "
    "certificate"
)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (TLS[:1], "--tls-cert: expected --tls-key beside it, got none"),
        (TLS[1:], "--tls-key: expected --tls-cert beside it, got none"),
        (
            ["--tls-client-ca=ca.pem"],
            "--tls-client-ca: expected --tls-cert and --tls-key beside it, got none",
        ),
        ([*TLS, "--tls-client-ca=ca.pem", "--playground"], WITHOUT_CERTIFICATE),
        (
            ["--rate-limit-images-per-s=5"],
            "--rate-limit-images-per-s: expected --auth-token-file, to tell callers by, got none",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_an_error(argv: Any, message: Any) -> None:
    assert errors_of(argv) == [message]


def test_settings_that_go_together_are_none() -> None:
    argv = [*TLS, "--tls-client-ca=ca", "--auth-token-file=t", "--rate-limit-images-per-s=5"]
    assert load_config(argv, {}).tls_client_ca == "ca"
    assert load_config([*TLS, "--playground"], {}).tls_cert == "cert.pem"


def test_security_can_not_be_switched_off_by_an_empty_value() -> None:
    """As when a script's own variable is not set."""
    for flag in ("--tls-cert", "--tls-client-ca", "--auth-token-file"):
        assert f"{flag}: expected a value, got nothing" in errors_of([f"{flag}="])


def test_key_for_signatures_can_not_be_empty() -> None:
    """An empty value must not quietly mean that no signature is asked for."""
    for argv, environ in (
        (["--model-public-key="], {}),
        (["--model-public-key"], {}),
        ([], {"DIGITS_MODEL_PUBLIC_KEY": ""}),
    ):
        with pytest.raises(ConfigError, match="expected a value, got nothing"):
            load_config(argv, environ)


def test_version_is_one_release_or_the_lowest_of_many() -> None:
    def wanted(text: str) -> Any:
        return wanted_releases(load_config([f"--model-version={text}"], {}))

    assert list(wanted("3")) == [3]
    assert 2 not in wanted("3+")
    assert 3 in wanted("3+")
    assert 10**9 in wanted("3+")
    assert 1 in wanted("0")


@pytest.mark.parametrize(
    "text", ["-1", "+", "0+", "03", "3++", "3 +", "\u0663", "latest", 11 * "1"]
)
def test_version_that_is_no_release_is_refused(text: Any) -> None:
    [error] = errors_of([f"--model-version={text}"])
    assert error.startswith("--model-version: expected 0, the number of a release, or")
