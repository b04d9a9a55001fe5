"""Weights go from files to a device as they are, also to pinned memory and through one pinned scratch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.contract.loading import Placement
from modules.offload.block_swap import host_weights
from modules.offload.swap_plan import SwapPlan
from modules.offload.turns import HostPlaceOf
from modules.speed_options import Quantisation
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from tests.gpu.measuring import equal_bits, poison, relative_error
from tests.tiny.project import write_lora
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit
from wan.spec import DIT

CPU = torch.device("cpu")
DIALECTS = ("safetensors", "pth", "diffusers", "fp8_scaled")


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("target", [None, torch.float32], ids=["as stored", "float32"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_device_gets_the_bytes_of_the_file(
    device: torch.device, tmp_path: Path, dialect: str, target: torch.dtype | None
) -> None:
    state = tiny_state("t2v", dtype=torch.bfloat16, num_layers=3)
    path = write_dit(tmp_path, state, dialect)
    poison(device, 1 << 24)
    found = state_of(load_dit(path, Placement(device, compute_dtype=target)))
    expected = state_of(load_dit(path, Placement(CPU, compute_dtype=target)))
    assert found.keys() == expected.keys()
    assert all(each.device.type == device.type for each in found.values())
    assert all(equal_bits(found[name], each) for name, each in expected.items())
    if dialect != "fp8_scaled":
        # some stay float32, which holds every number of bfloat16
        assert all(equal_bits(found[name], each.to(found[name].dtype)) for name, each in state.items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_host_memory_for_copies_gets_the_bytes_of_the_file(
    device: torch.device, tmp_path: Path, dialect: str
) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=4), dialect)
    expected = state_of(load_dit(path, Placement(CPU)))
    host = host_weights(SwapPlan(DIT, 3, input_layers=True), device)
    assert host is not None
    for place in (host, HostPlaceOf(device)):
        found = load_dit(path, Placement(device, host=place))
        assert all(equal_bits(each, expected[name]) for name, each in state_of(found).items())
        waiting = host.adopt(found) if place is host else place.tensors  # type: ignore[union-attr]
        assert len(waiting) > 10
        for name, each in waiting.items():
            assert each.is_pinned() is (device.type == "cuda")
            assert found.get_parameter(name).data_ptr() == each.data_ptr()


@pytest.mark.parametrize("kind", ["tensor", "rows"])
def test_weights_rounded_to_fp8_on_the_device_are_those_of_the_cpu(
    device: torch.device, tmp_path: Path, kind: str
) -> None:
    """The scale's last bit may differ, see test_fp8."""
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.float32, num_layers=2))
    quantisation = Quantisation(kind)
    found, expected = (
        state_of(load_dit(path, Placement(where, fp8=quantisation))) for where in (device, CPU)
    )
    scales = [name for name in expected if name.endswith("scale_weight")]
    assert len(scales) > 10
    for name, each in expected.items():
        if name in scales:
            assert relative_error(found[name], each) < 2**-8
        else:
            assert relative_error(found[name].float(), each.float()) < 0.01


def test_loras_are_merged_on_the_device(device: torch.device, tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.float32, num_layers=2))
    write_lora(tmp_path / "lora.safetensors", path)

    def loaded(where: torch.device, merged: bool) -> dict[str, Tensor]:
        patch = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors"))]) if merged else None
        return state_of(load_dit(path, Placement(where, patch=patch)))

    plain, expected, found = loaded(CPU, False), loaded(CPU, True), loaded(device, True)
    changed = [name for name in plain if not equal_bits(plain[name], expected[name])]
    assert len(changed) >= 3
    for name, each in expected.items():
        if name in changed:
            delta = each - plain[name]
            assert relative_error(found[name].cpu() - plain[name], delta) < 1e-3
        else:
            assert equal_bits(found[name], each)
