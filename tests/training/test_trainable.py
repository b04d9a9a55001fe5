"""What learns: a network beside the DiT, or the DiT."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.contract.loading import Placement
from modules.errors import OptionError
from networks.adapter import make_network
from tests.training.toy import ToyFamily, toy_options
from training.trainable import train_dit, train_network

CPU = torch.device("cpu")


def toy_dit() -> torch.nn.Module:
    return ToyFamily(dtype=torch.bfloat16).load_dit(Placement(CPU)).requires_grad_(False)


def test_a_network_learns_in_float32_and_the_dit_stays_as_it_is(tmp_path: Path) -> None:
    dit = toy_dit()
    network = make_network(toy_options(tmp_path).network, "networks.lora_wan", dit, seed=1)

    trainable = train_network(network, (0.5, None, None), None, CPU)

    assert {parameter.dtype for parameter in trainable.parameters} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in dit.parameters())
    assert set(trainable.names.values()) == {
        f"network.{name}" for name, _ in network.module.named_parameters()
    }
    assert trainable.limit_norms(CPU) == []


def test_lora_plus_is_a_second_group_with_a_name_and_a_rate(tmp_path: Path) -> None:
    options = toy_options(tmp_path, "--network_args", "loraplus_lr_ratio=4").network
    network = make_network(options, "networks.lora_wan", toy_dit(), seed=1)

    trainable = train_network(network, (0.5, None, None), 1.0, CPU)

    assert [group["lr"] for group in trainable.groups] == [0.5, 2.0]
    assert len(trainable.group_names) == 2
    assert len(trainable.limit_norms(CPU)) == 1


def test_the_whole_dit_learns_or_the_named_part_of_it(tmp_path: Path) -> None:
    dit = toy_dit()

    assert len(train_dit(dit, 0.1).parameters) == len(list(dit.parameters()))
    trainable = train_dit(dit, 0.1, ["blocks.1", "head"])

    assert {trainable.names[parameter] for parameter in trainable.parameters} == {
        f"dit.{name}" for name, _ in dit.named_parameters() if name.startswith(("blocks.1", "head"))
    }
    assert {name for name, parameter in dit.named_parameters() if parameter.requires_grad} == {
        name for name, _ in dit.named_parameters() if name.startswith(("blocks.1", "head"))
    }
    trainable.writes[""](tmp_path / "dit.safetensors", torch.float16, {"a": "b"})
    saved = load_file(tmp_path / "dit.safetensors")
    assert saved.keys() == dit.state_dict().keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}


def test_a_part_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="nonsense"):
        train_dit(toy_dit(), 0.1, ["nonsense"])
