from __future__ import annotations

import pytest

from service import cli
from service.config import load_config
from service.tune import AS_GOOD, Row, choose, env_file, splits
from tests.conftest import REPOSITORY


def row(batch, single, bulk):
    return Row(instances=2, threads=1, batch=batch, rates={"single": single, "bulk": bulk})


def test_smallest_batch_that_is_as_good_as_the_best_is_chosen():
    rows = [row(16, 50, 50), row(32, 98, 98), row(64, 99, 99), row(128, 100, 100)]
    chosen = choose(rows)
    assert chosen.batch == 32
    assert chosen.score >= AS_GOOD * max(r.score for r in rows)


def test_a_setting_has_to_serve_both_loads():
    assert choose([row(16, 100, 10), row(64, 60, 60)]).batch == 64


@pytest.mark.parametrize(("quota", "expected"), [(1, {(1, 1)}), (2, {(2, 1), (1, 1), (1, 2)})])
def test_settings_stay_within_the_quota(quota, expected):
    assert set(splits(quota)) == expected
    for instances, threads in splits(16):
        assert 1 <= instances * threads <= 16


def test_written_file_is_what_serve_reads(tmp_path, capsys):
    out = tmp_path / "digits.env"
    arguments = ["tune", f"--model-repository={REPOSITORY}", "--seconds=0.02", "--rounds=1"]
    assert cli.main([*arguments, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    [chosen] = [line.split() for line in printed.splitlines() if line.endswith("<- chosen")]
    config = load_config([f"--env-file={out}"], {})
    assert [config.instances, config.intra_op_threads, config.max_batch_size] == [
        int(text) for text in chosen[:3]
    ]


def test_file_is_weaker_than_the_environment_and_that_than_a_flag(tmp_path):
    path = tmp_path / "digits.env"
    path.write_text("# tuned\n\n" + env_file(row(16, 1, 1)))
    assert load_config([f"--env-file={path}"], {}).max_batch_size == 16
    environ = {"DIGITS_MAX_BATCH_SIZE": "32", "DIGITS_ENV_FILE": str(path)}
    assert load_config([], environ).max_batch_size == 32
    assert load_config(["--max-batch-size=64"], environ).max_batch_size == 64


def test_tune_without_a_model_says_so(tmp_path, capsys):
    assert cli.main(["tune", f"--model-repository={tmp_path}"]) == 1
    assert "no version to tune for" in capsys.readouterr().err
