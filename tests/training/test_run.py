"""What is refused before a run is prepared."""

from pathlib import Path

import pytest

from modules.errors import OptionError, OutputError
from tests.training.toy import ToyFamily, train_toy, write_caches


def test_products_in_fp8_are_refused_at_start_where_the_device_has_none(tmp_path: Path) -> None:
    write_caches(tmp_path)
    watched: list[int] = []

    with pytest.raises(OptionError, match=r"--fp8_fast: the device cpu has no fp8 units"):
        train_toy(
            tmp_path, "--fp8_base", "--fp8_scaled", "--fp8_fast", family=ToyFamily(watch=watched.append)
        )

    assert not watched
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_logging_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path, count=0)  # which would be told later

    with pytest.raises(OutputError, match=r"--logging_dir /proc/x cannot be created"):
        train_toy(tmp_path, "--logging_dir", "/proc/x")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_folder_that_nothing_can_be_written_to_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path)
    watched: list[int] = []

    with pytest.raises(OutputError, match=r"--output_dir /proc/self: nothing can be written there"):
        train_toy(tmp_path, "--output_dir", "/proc/self", family=ToyFamily(watch=watched.append))

    assert not watched
