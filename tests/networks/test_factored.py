"""LoHa and LoKr as networks: what they add, their gradients, files that load elsewhere, settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from modules.contract.loading import Placement
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.deltas import weight_delta
from networks.factored import FactoredLayer, loha_shapes, lokr_shapes, split_size
from networks.loading import LoraUse, read_lora
from tests.tiny.loras import lora_like
from tests.training.conftest import _fresh_accelerator  # noqa: F401
from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from training.run import train_network

KINDS = {
    "LoHa": loha_shapes(12, 8, 2),
    "LoKr": lokr_shapes(12, 16, 1),
    "LoKr whole": lokr_shapes(12, 8, 64),
    "LoKr of four": lokr_shapes(144, 144, 2, decompose_both=True),
    "LoKr by 2": lokr_shapes(12, 8, 1, factor=2),
}
NETWORKS: dict[str, list[object]] = {
    "loha": ["--network_module", "networks.loha", "--network_dim", 2],
    "lokr": ["--network_module", "networks.lokr", "--network_dim", 1],
    "lokr whole": ["--network_module", "networks.lokr", "--network_dim", 100000],
    "lokr by 2": ["--network_module", "networks.lokr", "--network_args", "factor=2", "decompose_both=True"],
}


def size_of(shapes: Any) -> tuple[int, int]:
    """Outputs and inputs of the weight that factors of these shapes change."""
    found = weight_delta({name: torch.zeros(shape) for name, shape in shapes.items()}, torch.device("meta"))
    assert found is not None
    return tuple(found.shape)  # type: ignore[return-value]


def random_layer(kind: str, alpha: float = 0.7) -> tuple[nn.Linear, FactoredLayer]:
    torch.manual_seed(3)
    shapes = KINDS[kind]
    out_features, in_features = size_of(shapes)
    rank = {"LoKr": 1, "LoKr by 2": 1, "LoKr whole": 64}.get(kind, 2)
    original = nn.Linear(in_features, out_features).requires_grad_(False)
    layer = FactoredLayer(original, shapes, rank, alpha)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return original, layer


def by_deltas(original: nn.Linear, layer: FactoredLayer, x: Tensor) -> Tensor:
    """The output with the weight that generation merges."""
    delta = weight_delta(layer.state_dict(keep_vars=True), x.device)
    assert delta is not None
    return nn.functional.linear(x, original.weight + layer.multiplier * delta, original.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_merged_weight(kind: str) -> None:
    original, layer = random_layer(kind)
    x = torch.randn(2, 5, original.in_features, requires_grad=True)
    layer.multiplier = 0.5
    expected = by_deltas(original, layer, x)
    layer.attach()
    found = original(x)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    layer.multiplier = 0.0
    assert torch.equal(original(x), nn.functional.linear(x, original.weight, original.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_the_change_and_shrinks_with_it(kind: str) -> None:
    _, layer = random_layer(kind)
    delta = weight_delta(layer.state_dict(), torch.device("cpu"))
    assert delta is not None
    with torch.no_grad():
        torch.testing.assert_close(layer.norm(), torch.linalg.vector_norm(delta))
        before = layer.norm()
        layer.shrink(torch.tensor(0.25))
        torch.testing.assert_close(layer.norm(), before / 4)


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        # as LyCORIS documents them
        *[(127, -1, (1, 127)), (128, -1, (8, 16)), (250, -1, (10, 25)), (360, -1, (18, 20))],
        *[(512, -1, (16, 32)), (1024, -1, (32, 32)), (128, 2, (2, 64)), (250, 4, (2, 125))],
        *[(360, 8, (8, 45)), (512, 4, (4, 128)), (1024, 16, (16, 64)), (12, 6, (2, 6))],
    ],
)
def test_a_size_is_split(size: int, factor: int, wanted: tuple[int, int]) -> None:
    assert split_size(size, factor) == wanted


def test_large_ranks_keep_matrices_whole() -> None:
    assert lokr_shapes(512, 512, 15) == {"lokr_w1": (16, 16), "lokr_w2_a": (32, 15), "lokr_w2_b": (15, 32)}
    assert lokr_shapes(512, 512, 16) == {"lokr_w1": (16, 16), "lokr_w2": (32, 32)}
    assert lokr_shapes(512, 512, 7, decompose_both=True).keys() >= {"lokr_w1_a", "lokr_w1_b"}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_was_trained_is_what_generation_adds(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    tensors = train_toy(tmp_path, *NETWORKS[kind], "--network_alpha", 0.5, "--max_train_steps", 3)
    path = tmp_path / "output" / "x.safetensors"
    patch = LoraPatch([LoraUse(read_lora(path))])
    merged = ToyFamily().load_dit(Placement(torch.device("cpu"), patch=patch))
    patch.check()
    dit = ToyFamily().load_dit(Placement(torch.device("cpu")))
    network = lora_like("loha" if kind == "loha" else "lokr", read_lora(path).tensors, dit)
    network.attach()
    assert network.load_weights(path) == []
    x = torch.randn(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]

    with torch.no_grad():
        found, plain = dit(*x), ToyFamily().load_dit(Placement(torch.device("cpu")))(*x)
        torch.testing.assert_close(found, merged(*x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, plain)
    assert same(network.state_dict(), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_module"] == NETWORKS[kind][1]


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_run_resumes_and_continues_from_a_file(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    precision = ["--mixed_precision", "bf16"]
    usual = [*NETWORKS[kind], *precision, "--scale_weight_norms", "0.1"]
    expected = train_toy(tmp_path, *usual)
    train_toy(tmp_path, *usual, "--max_train_steps", 4, "--save_state")
    assert same(train_toy(tmp_path, *usual, "--resume", "latest"), expected)
    path = tmp_path / "output" / "x.safetensors"

    still = [*precision, "--learning_rate", 0, "--max_train_steps", 1, "--network_weights", path]
    assert same(train_toy(tmp_path, *NETWORKS[kind], *still), load_file(path))
    wanted = load_file(path)
    assert same(train_toy(tmp_path, *NETWORKS[kind][:2], *still, "--dim_from_weights"), wanted)


@pytest.mark.parametrize(
    "given",
    [
        ["--network_module", "networks.lokr", "--network_args", "factor=0"],
        ["--network_module", "networks.lokr", "--network_args", "factor=x"],
        ["--network_module", "networks.lokr", "--network_args", "decompose_both=maybe"],
        ["--network_module", "networks.loha", "--network_dropout", 0.1],
        ["--network_module", "networks.loha", "--network_args", "module_dropout=0.1"],
        ["--network_module", "networks.lokr", "--network_args", "loraplus_lr_ratio=4"],
        ["--network_module", "networks.loha", "--network_dim", 5000],
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(tmp_path: Path, given: list[object]) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match="--network_"):
        train_network(ToyFamily(), toy_options(tmp_path, *given))


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [("lokr", [], "--dim_from_weights"), ("lokr", ["--dim_from_weights"], "another kind of network")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, kind: str, more: list[object], words: str) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--max_train_steps", 1)
    weights = ["--network_weights", tmp_path / "output" / "x.safetensors", *more]

    with pytest.raises(CheckpointError, match=words):
        train_network(ToyFamily(), toy_options(tmp_path, *NETWORKS[kind], *weights))
