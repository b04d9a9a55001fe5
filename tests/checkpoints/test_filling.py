"""Networks filled from model files: in any dtype, bad weights named, which layers multiply in 8 bits."""

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.filling import load_module
from checkpoints.finite import is_finite
from checkpoints.opening import list_tensor_sources, open_checkpoint
from checkpoints.stored.fp8 import E4M3
from modules.errors import CheckpointError
from modules.speed_options import Quantization
from pocket.measure import POCKET
from protocols.loading import Placement, TensorSource
from tests.fp8_reference import emulated_product, quantized_layers
from tests.modules.making import write
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DtypeOf = Callable[[str, torch.dtype], torch.dtype]  # name and dtype in the file -> dtype to keep


def network() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))  # parameters and buffers


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()


def same(name: str, stored: torch.dtype) -> torch.dtype:
    return stored


def fill(
    module: nn.Module, path: Path, dtype: DtypeOf = same, device: torch.device = CPU, **more: Any
) -> None:
    with open_checkpoint(path) as checkpoint:
        load_module(module, checkpoint, list_tensor_sources(checkpoint), device=device, dtype=dtype, **more)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_in_the_dtype_asked_for(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, content = network(), state()
    path = write(tmp_path / name, content)

    fill(module, path, lambda _, stored: dtype if stored.is_floating_point else stored)

    for key, tensor in module.state_dict().items():
        assert tensor.dtype == (dtype if content[key].is_floating_point() else content[key].dtype)
        assert torch.equal(tensor, content[key].to(tensor.dtype))
    assert not any(weight.requires_grad for weight in module.parameters())


def test_sources_rename_split_and_transpose(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"k": nn.Linear(4, 8, bias=False), "v": nn.Linear(4, 8, bias=False)})
    stacked = torch.arange(64.0).reshape(4, 16)
    both = TensorSource(("kv",)).with_step(torch.t)
    sources = {
        "k.weight": both.with_step(lambda rows: rows[:8]),
        "v.weight": both.with_step(lambda rows: rows[8:]),
    }

    with open_checkpoint(write(tmp_path / "a.safetensors", {"kv": stacked})) as checkpoint:
        load_module(module, checkpoint, sources, device=CPU, dtype=same)

    assert torch.equal(module["v"].weight, stacked[:, 8:].t())
    assert module["v"].weight.untyped_storage().nbytes() == 8 * 4 * 4  # not the whole of what it was cut from


def test_on_the_meta_device_nothing_is_read(tmp_path: Path) -> None:
    module = network()
    with open_checkpoint(write(tmp_path / "a.safetensors", state())) as checkpoint:
        pass
    # closed: reading would fail now
    load_module(module, checkpoint, list_tensor_sources(checkpoint), device=torch.device("meta"), dtype=same)

    assert module[0].weight.is_meta


def test_a_patch_meets_fp8_weights_in_the_target_dtype(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 8, bias=False)
    path = write(tmp_path / "a.safetensors", {"weight": torch.ones(8, 4).to(torch.float8_e4m3fn)})

    fill(module, path, lambda *_: torch.bfloat16, patch=lambda name, weight, _: weight + 2.0**-7)

    assert torch.equal(module.weight, torch.full((8, 4), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_newer_fp8_files_with_their_own_record_are_read(tmp_path: Path) -> None:
    content = {
        "0.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
        "0.weight_scale": torch.tensor(0.5),
        "0.input_scale": torch.tensor(1.0),
        "0.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8),
    }
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(2, 2, bias=False))

    fill(module, write(tmp_path / "a.safetensors", content), lambda *_: torch.bfloat16)

    assert torch.equal(module[0].weight, torch.full((2, 2), 0.5, dtype=torch.bfloat16))


def test_a_planned_network_is_ready_to_be_asked(tmp_path: Path) -> None:
    """Built from the plan's dimensions, with nothing that learns and no dropout."""
    content = {**nn.Linear(3, 2).state_dict(prefix="0."), "unused": torch.ones(1)}

    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 2), nn.Dropout())

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        plan = LoadPlan(3, checkpoint, list_tensor_sources(checkpoint), ignore=("unused",))
        loaded = load_planned(plan, build, CPU, torch.float32, "--network")

    assert not any(module.training for module in loaded.modules())
    assert not any(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize("refuses", [False, True])
def test_pinned_memory_is_given_back_after_loading_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """CUDA's part of torch stands in: tensors sent there stay here."""
    pinned, released, empty, to = [], [], torch.empty, Tensor.to

    def allocate(*sizes: Any, pin_memory: bool = False, device: Any = None, **named: Any) -> Tensor:
        if pin_memory and refuses:
            raise RuntimeError("CUDA error: out of memory\nadvice")
        made = empty(*sizes, device=None if device == CUDA else device, **named)
        if pin_memory:
            pinned.append(weakref.ref(made.untyped_storage()))
        return made

    def send(tensor: Tensor, *place: Any, **named: Any) -> Tensor:
        return tensor.clone() if place == (CUDA,) else to(tensor, *place, **named)

    def release() -> None:  # torch releases only what nothing uses
        released.append([one() is None for one in pinned])

    module, content = network(), state()
    path = write(tmp_path / "model.safetensors", content)
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(Tensor, "to", send)
    monkeypatch.setattr(torch._C, "_host_emptyCache", release, raising=False)

    fill(module, path, device=CUDA)

    assert released == ([[]] if refuses else [[True]])
    assert all(torch.equal(tensor, content[key]) for key, tensor in module.state_dict().items())


WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")


@pytest.mark.parametrize("dtype", WIDE)
def test_a_single_value_is_found(dtype: torch.dtype) -> None:
    tensor = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[7], tensor[8] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert is_finite(tensor)
    for place, value in itertools.product((0, 500, 1023), (math.nan, math.inf, -math.inf)):
        damaged = tensor.clone()
        damaged[place] = value
        assert not is_finite(damaged.view(32, 32))
        assert not is_finite(damaged.view(32, 32).T)


@pytest.mark.parametrize("name", NARROW)
def test_every_code_of_fp8_is_known(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    for code in codes.split(1):
        assert bool(is_finite(code.view(1, 1))) == bool(code.float().isfinite())


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_bad_weight_is_named_with_its_file(tmp_path: Path, kept: torch.dtype) -> None:
    content = state()
    content["0.weight"][0, 1] = math.inf
    path = write(tmp_path / "model.safetensors", content)

    with pytest.raises(
        CheckpointError, match=r"model.safetensors has .* NaN or infinite: 0.weight \(1 of 32"
    ):
        fill(network(), path, lambda _, stored: kept if stored.is_floating_point else stored)


PLAIN = Placement(torch.device("cpu"))
FAST = Quantization("rows", fp8_matmul=True, product=emulated_product)
ROWS = Quantization("rows")
BLOCKS = 8  # of the pocket model
LAST = f"blocks.{BLOCKS - 1}.ffn.0.weight"


def quantized_blocks(path: Path, quantization: Quantization) -> set[int]:
    dit = load_dit(path, replace(PLAIN, quantization=quantization))
    return {int(name.split(".")[1]) for name in quantized_layers(dit)}


def test_the_last_two_blocks_stay_in_16_bits_where_the_others_multiply_in_8() -> None:
    path = POCKET / "dit.safetensors"

    assert quantized_blocks(path, ROWS) == set(range(BLOCKS))
    assert quantized_blocks(path, FAST) == set(range(BLOCKS - 2))
    last = load_dit(path, replace(PLAIN, quantization=FAST)).get_parameter(LAST)
    assert torch.equal(last, load_file(path)[LAST])


def test_a_network_of_few_blocks_multiplies_in_8_bits_in_all(tmp_path: Path) -> None:
    assert quantized_blocks(write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16)), FAST) == {0, 1}


def test_the_last_blocks_of_an_fp8_file_are_multiplied_out(tmp_path: Path) -> None:
    state, fast = load_file(POCKET / "dit.safetensors"), replace(FAST, kind="cast")
    for name in quantized_layers(load_dit(POCKET / "dit.safetensors", replace(PLAIN, quantization=ROWS))):
        state[f"{name}.weight"] = state[f"{name}.weight"].to(E4M3)
    save_file(state, tmp_path / "dit.safetensors")

    last = load_dit(tmp_path / "dit.safetensors", replace(PLAIN, quantization=fast)).get_parameter(LAST)

    assert quantized_blocks(tmp_path / "dit.safetensors", fast) == set(range(BLOCKS - 2))
    assert torch.equal(last, state[LAST].bfloat16())


@pytest.mark.slow_cases("how0")
@pytest.mark.parametrize("how", [FAST, replace(FAST, kind="cast")])
def test_a_network_that_multiplies_in_8_bits_predicts_nearly_the_same(how: Quantization) -> None:
    path = POCKET / "dit.safetensors"
    noisy = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = noisy, torch.tensor([500.0]), [torch.zeros(3, 64)]

    with torch.no_grad():
        expected, found = (load_dit(path, one)(*inputs) for one in (PLAIN, replace(PLAIN, quantization=how)))

    # 2.7 % in ten layers of each of six blocks, beside a stream that passes them unrounded
    assert 0.001 < (found - expected).norm() / expected.norm() < 0.1


def test_a_message_about_tensors_stays_short_however_many_there_are(tmp_path: Path) -> None:
    further = {
        f"{character}{index}.{character}": torch.zeros(0) for index in range(200) for character in "abc"
    }
    path = write(tmp_path / "model.safetensors", {**state(), **further})

    with pytest.raises(CheckpointError, match="500 lines like these") as caught:
        fill(network(), path)

    assert len(str(caught.value).splitlines()) < 110
