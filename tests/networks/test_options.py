"""Options of networks: what is refused before anything is loaded, and what they mean."""

import argparse
from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.options import read_options
from networks.options import LoraOptions, NetworkOptions, add_lora_arguments, add_network_arguments


def network(*argv: str) -> NetworkOptions:
    parser = argparse.ArgumentParser()
    add_network_arguments(parser)
    return read_options(NetworkOptions, parser.parse_args(argv))


def test_the_first_equals_sign_splits_network_args() -> None:
    options = network("--network_args", "exclude_patterns=[r'a=b']", "rank_dropout = 0.1")

    assert options.arguments() == {"exclude_patterns": "[r'a=b']", "rank_dropout": "0.1"}


def test_missing_multipliers_are_one_and_a_single_number_is_a_list(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.touch()
    parser = argparse.ArgumentParser()
    add_lora_arguments(parser)

    options = read_options(
        LoraOptions, parser.parse_args(["--lora_weight", *map(str, files), "--lora_multiplier", "0.5"])
    )
    assert options.multipliers() == (0.5, 1.0)
    assert read_options(LoraOptions, parser.parse_args([])).multipliers() == ()
    assert network(
        "--base_weights", *map(str, files), "--base_weights_multiplier", "2"
    ).base_multipliers() == (2.0, 1.0)


def test_multipliers_without_a_file_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a"
    file.touch()
    parser = argparse.ArgumentParser()
    add_lora_arguments(parser)

    read_options(LoraOptions, parser.parse_args([]))
    read_options(LoraOptions, parser.parse_args(["--lora_weight", str(file), "--lora_multiplier", "0.5"]))
    assert not caplog.text
    read_options(
        LoraOptions, parser.parse_args(["--lora_weight", str(file), "--lora_multiplier", "1", "0.5", "2"])
    )
    network("--base_weights", str(file), "--base_weights_multiplier", "1", "3")
    assert "--lora_multiplier: 0.5 2 is ignored" in caplog.text
    assert "--base_weights_multiplier: 3 is ignored" in caplog.text


@pytest.mark.parametrize(
    "argv",
    [
        ["--network_dim", "0"],
        ["--network_alpha", "-1"],
        ["--network_dropout", "1"],
        ["--network_args", "verbose"],
        ["--dim_from_weights"],
        ["--scale_weight_norms", "0"],
        ["--base_weights_multiplier", "1"],
    ],
)
def test_what_cannot_be_used_is_refused_by_name(argv: list[str]) -> None:
    with pytest.raises(OptionError, match=argv[0]):
        network(*argv)


@pytest.mark.parametrize("option", ["--network_weights", "--base_weights"])
def test_missing_files_are_found_out_at_once(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option} nothing.safetensors"):
        network(option, "nothing.safetensors")
