"""A run calls nothing that only an option or key needs that it does not have; with that, it is called."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import pytest

from networks.kinds.tlora import SWITCH
from tests.training import toy

# a function -> the options, or the keys of the dataset's table, that need it
WITH_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "training.resuming.collect_run_settings": ("--save_state",),
    "training.resuming.epoch_digest": ("--save_state",),
    "training.summary._sampling_times": ("--sample_prompts", "prompts.txt"),
    "training.reports.logs._list_tracked_values": ("--item_losses",),
    "networks.builtin_networks._mask_ranks": ("--network_args", f"{SWITCH}=True"),
    "networks.lora_layer.LoraLayer._masked": ("--network_dropout", 0.1),
}
WITH_KEYS: Mapping[str, str] = {"training.data.table_times.describe_times": "min_timestep = 100"}


def list_called(folder: Path, *options: object, keys: str = "") -> set[str]:
    """Train two steps in a folder; return the functions that were called, by module and name."""
    folder.mkdir()
    toy.write_caches(folder, more=keys)
    toy.write_prompts(folder)
    options = tuple(folder / word if word == "prompts.txt" else word for word in options)
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        toy.train_toy(folder, "--max_train_steps", 2, "--mixed_precision", "bf16", *options)
    finally:
        sys.setprofile(before)
    return called


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The functions that a run without further options calls."""
    return list_called(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("function", WITH_OPTIONS)
def test_what_only_an_option_needs_is_called_with_it_alone(
    tmp_path: Path, plain: set[str], function: str
) -> None:
    assert function not in plain
    assert function in list_called(tmp_path / "run", *WITH_OPTIONS[function])


@pytest.mark.parametrize("function", WITH_KEYS)
def test_what_only_a_key_of_a_table_needs_is_called_with_it_alone(
    tmp_path: Path, plain: set[str], function: str
) -> None:
    assert function not in plain
    assert function in list_called(tmp_path / "run", keys=WITH_KEYS[function])
