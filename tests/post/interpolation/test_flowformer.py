"""FlowFormer: equal to the recorded flows, of any width, in parts as in one piece."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from post.interpolation.files import is_with_raft, read_gimm
from post.interpolation.flowformer import (
    FlowDecoderConfig,
    FlowFormer,
    FlowFormerConfig,
    read_flowformer,
)
from post.interpolation.flowformer_memory import MemoryConfig
from post.interpolation.motion import GimmVfi
from post.interpolation.twins import StageConfig
from tests.golden_cases import read_case
from tests.manifests import tensor_list, write_hollow
from tests.post.interpolation.recorded import check_recorded, recorded_weights, write_recorded
from tests.tiny.post_flowformer import FLOWFORMER, flowformer_tensors, tiny_flowformer, write_flowformer

CPU, META = torch.device("cpu"), torch.device("meta")
TRUNK = (StageConfig(4, 128, 8), StageConfig(2, 256, 4))
RELEASED = FlowFormerConfig(
    features=TRUNK,
    context=TRUNK,
    matching=256,
    memory=MemoryConfig(tokens=8, width=128, context=256, context_part=64, costs=(16, 32, 64), layers=3),
    decoder=FlowDecoderConfig(
        memory=128,
        query=64,
        hidden=128,
        compared=128,
        correlation=(256, 192),
        flow=(128, 64),
        motion=128,
        head=256,
        mask=256,
    ),
)


def load(path: Path, device: torch.device = CPU) -> FlowFormer:
    with open_checkpoint(path) as checkpoint:
        return load_planned(read_flowformer(checkpoint), FlowFormer, device, torch.float32, "--model")


def pair(height: int = 128, width: int = 160) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = 255 * torch.rand(1, 3, height, width, generator=generator)
    return image, image.roll((3, -2), dims=(2, 3))


def flow_of(network: FlowFormer, first: Tensor, second: Tensor) -> Tensor:
    with torch.no_grad():
        return network.flow(network.encode(first), network.encode(second))


def test_flow_is_as_recorded() -> None:
    _, tensors = read_case("gimmvfi_f")
    with META:
        network = FlowFormer(RELEASED)
    weights = recorded_weights("flowformer-sintel", {"flow_head.conv2": 0.05})
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, assign=True)

    flow = flow_of(network, tensors["image0"].float(), tensors["image1"].float())

    # the case allows 5e-3; float32 is better than that, up to about 5.5e-5
    torch.testing.assert_close(flow[..., ::4, ::4], tensors["flow01_every_4th"], rtol=0, atol=1.5e-4)


@pytest.mark.slow
def test_frames_made_with_flowformer_are_as_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("gimmvfi_f")
    main, flow = write_recorded(tmp_path, case, "gimmvfi-f", "flowformer-sintel")
    with open_checkpoint(main) as checkpoint:
        plan = read_gimm(checkpoint)
        network = load_planned(plan, GimmVfi, CPU, torch.float32, "--model")
    assert not is_with_raft(plan.config)
    check_recorded(case, tensors, network, load(flow))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_flowformer_loads_at_full_size(tmp_path: Path, prefix: str) -> None:
    tensors = tensor_list("flowformer-sintel")
    path = write_hollow(tmp_path / "flow.safetensors", tensors, prefix)
    with open_checkpoint(path) as checkpoint:
        plan = read_flowformer(checkpoint)
        network = load_planned(plan, FlowFormer, META, torch.float32, "--model")
    assert plan.config == RELEASED
    used = {name for name in tensors if ".svt.norm." not in name and ".pos_emb." not in name}
    assert set(network.state_dict()) == used


def test_a_narrow_file_gives_the_same_flow_in_any_layout(tmp_path: Path) -> None:
    with open_checkpoint(path := write_flowformer(tmp_path / "flow.safetensors")) as checkpoint:
        assert read_flowformer(checkpoint).config == FLOWFORMER
    first, second = pair()

    flow = flow_of(load(path), first, second)

    assert flow.shape == (1, 2, 128, 160)
    assert flow.dtype == torch.float32
    assert 0.1 < float(flow.abs().mean()) < 50
    assert torch.equal(flow_of(load(write_flowformer(tmp_path / "flow.pth", "module.")), first, second), flow)


def test_large_pictures_have_the_flow_that_small_ones_would_have() -> None:
    """Without tables of all pairs, which take too much memory for large pictures."""
    network = tiny_flowformer()
    frugal = FlowFormer(FLOWFORMER, table_bytes=0)
    frugal.load_state_dict(network.state_dict())
    first, second = pair()
    flow = flow_of(network, first, second)
    limit = 1e-5 * float(flow.abs().max())
    torch.testing.assert_close(flow_of(frugal, first, second), flow, rtol=0, atol=limit)


def test_another_network_is_named(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "raft.safetensors", tensor_list("raft-things"))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="is not a FlowFormer"):
        read_flowformer(checkpoint)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("context_encoder.svt.patch_embeds.0.proj.weight", (48, 3, 4, 4)),  # not whole heads
        ("context_encoder.svt.patch_embeds.0.proj.weight", (32, 3, 8, 8)),  # not a quarter
        ("memory_decoder.proj.weight", (0, 64, 1, 1)),
        ("memory_encoder.cost_perceiver_encoder.latent_tokens", (16,)),
        ("memory_encoder.cost_perceiver_encoder.latent_tokens", (1, 3, 12)),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = {key: ("F32", tuple(tensor.shape)) for key, tensor in flowformer_tensors().items()}
    path = write_hollow(tmp_path / "flow.safetensors", {**tensors, name: ("F32", shape)})
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="is not a FlowFormer"):
        read_flowformer(checkpoint)


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in flowformer_tensors().items()}
    del tensors["memory_decoder.att.to_qk.weight"]
    path = write_hollow(tmp_path / "flow.safetensors", tensors)
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"att\.to_qk"):
        read_flowformer(checkpoint)
