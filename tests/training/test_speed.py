"""Compiled blocks and what checkpoints keep, in whole runs: full fine-tuning, LoRA with dropout, kills in
between.
"""

import logging
from pathlib import Path

import pytest

from modules.errors import OptionError
from tests.training.test_resume import EVERYTHING
from tests.training.toy import same, train_toy, train_with_kills, write_caches

CHECKPOINTS = [
    *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"),
    *("--gradient_checkpointing_keep", "attention"),
]
COMPILED = ["--compile", "--compile_args", "eager", "default", "auto", "true"]


pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.mark.parametrize("how", [CHECKPOINTS, [*CHECKPOINTS, *COMPILED]], ids=["checkpoints", "compiled"])
@pytest.mark.parametrize("moment", [1, 8])
def test_a_killed_run_ends_with_the_bytes_of_a_plain_one(tmp_path: Path, moment: int, how: list[str]) -> None:
    write_caches(tmp_path, count=5)
    expected = train_toy(tmp_path, *EVERYTHING)

    assert same(expected, train_with_kills(tmp_path, *EVERYTHING, *how, moments=(moment,)))


def test_a_backend_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Not even the caches are looked for, of which there are none."""
    (tmp_path / "dataset.toml").write_text(
        f'[[datasets]]\nimage_directory = "{tmp_path.as_posix()}"\n', encoding="utf-8"
    )

    with pytest.raises(OptionError, match=r"no backend ofi here"):
        train_toy(tmp_path, "--dynamo_backend", "ofi")


def test_a_run_that_goes_on_uncompiled_is_told_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, *COMPILED, "--max_train_steps", 2, "--save_state")

    with caplog.at_level(logging.WARNING):
        train_toy(tmp_path, "--max_train_steps", 3, "--resume", "latest")

    assert "--compile was True when the state was saved" in caplog.text
