"""Options of networks: what is refused before anything is loaded, and what they mean."""

from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.parser import parse_options
from networks.options import LoraOptions, NetworkOptions


def network(*argv: str) -> NetworkOptions:
    return parse_options("", argv, NetworkOptions)[0]


def lora(*argv: str) -> LoraOptions:
    return parse_options("", argv, LoraOptions)[0]


def test_the_first_equals_sign_splits_network_args() -> None:
    options = network("--network_args", "exclude_patterns=[r'a=b']", "rank_dropout = 0.1")

    assert options.arguments() == {"exclude_patterns": "[r'a=b']", "rank_dropout": "0.1"}


def test_multipliers_without_a_file_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a"
    file.touch()

    lora()
    lora("--lora_weight", str(file), "--lora_multiplier", "0.5")
    assert not caplog.text
    lora("--lora_weight", str(file), "--lora_multiplier", "1", "0.5", "2")
    network("--base_weights", str(file), "--base_weights_multiplier", "1", "3")
    assert "--lora_multiplier: 0.5 2 is ignored" in caplog.text
    assert "--base_weights_multiplier: 3 is ignored" in caplog.text


@pytest.mark.parametrize("option", ["--network_weights", "--base_weights"])
def test_missing_files_are_found_out_at_once(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} nothing.safetensors"):
        network(option, "nothing.safetensors")
