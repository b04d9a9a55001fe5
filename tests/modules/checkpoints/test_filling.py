"""Networks filled from model files."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.checkpoints.filling import load_module
from modules.checkpoints.opening import open_checkpoint, plain_sources
from modules.contract.loading import TensorSource
from tests.modules.making import write

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def network() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))  # parameters and buffers


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()


def same(name: str, stored: torch.dtype) -> torch.dtype:
    return stored


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_filled_in_the_dtype_asked_for(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    module, content = network(), state()

    with open_checkpoint(write(tmp_path / name, content)) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: dtype if stored.is_floating_point else stored,
        )

    for key, tensor in module.state_dict().items():
        assert tensor.dtype == (dtype if content[key].is_floating_point() else content[key].dtype)
        assert torch.equal(tensor, content[key].to(tensor.dtype))
    assert not any(weight.requires_grad for weight in module.parameters())


def test_sources_rename_split_and_transpose(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"k": nn.Linear(4, 8, bias=False), "v": nn.Linear(4, 8, bias=False)})
    stacked = torch.arange(64.0).reshape(4, 16)
    both = TensorSource(("kv",)).then(torch.t)
    sources = {"k.weight": both.then(lambda rows: rows[:8]), "v.weight": both.then(lambda rows: rows[8:])}

    with open_checkpoint(write(tmp_path / "a.safetensors", {"kv": stacked})) as checkpoint:
        load_module(module, checkpoint, sources, device=CPU, dtype=same)

    assert torch.equal(module["v"].weight, stacked[:, 8:].t())
    assert module["v"].weight.untyped_storage().nbytes() == 8 * 4 * 4  # not the whole of what it was cut from


def test_on_the_meta_device_nothing_is_read(tmp_path: Path) -> None:
    module = network()
    with open_checkpoint(write(tmp_path / "a.safetensors", state())) as checkpoint:
        checkpoint.close()  # reading would fail now
        load_module(module, checkpoint, plain_sources(checkpoint), device=torch.device("meta"), dtype=same)

    assert module[0].weight.is_meta


def test_a_patch_meets_fp8_weights_in_the_target_dtype(tmp_path: Path) -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 8, bias=False)
    weight = torch.ones(8, 4).to(torch.float8_e4m3fn)

    with open_checkpoint(write(tmp_path / "a.safetensors", {"weight": weight})) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: torch.bfloat16,
            patch=lambda name, weight: weight + 2.0**-7,
        )

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

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        load_module(
            module,
            checkpoint,
            plain_sources(checkpoint),
            device=CPU,
            dtype=lambda name, stored: torch.bfloat16,
        )

    assert torch.equal(module[0].weight, torch.full((2, 2), 0.5, dtype=torch.bfloat16))


class Pinning:
    """Stands in for CUDA's part of torch: tensors sent there stay here, and pinned memory is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        self.refuses, self.log = refuses, list[str]()
        self._held = 0
        self._empty, self._to = torch.empty, Tensor.to
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(Tensor, "to", lambda tensor, *to, **named: self.to(tensor, *to, **named))
        monkeypatch.setattr(torch._C, "_host_emptyCache", self.release, raising=False)

    def empty(self, *sizes: Any, pin_memory: bool = False, device: Any = None, **named: Any) -> Tensor:
        if pin_memory and self.refuses:
            raise RuntimeError("CUDA error: out of memory\nadvice")
        made = self._empty(*sizes, device=None if device == CUDA else device, **named)
        if pin_memory:
            self._held += 1
            self.log.append("pin")
            weakref.finalize(made.untyped_storage(), self._free)
        return made

    def to(self, tensor: Tensor, *to: Any, **named: Any) -> Tensor:
        return tensor.clone() if to == (CUDA,) else self._to(tensor, *to, **named)

    def release(self) -> None:
        assert not self._held, "torch releases only what nothing uses"
        self.log.append("release")

    def _free(self) -> None:
        self._held -= 1


@pytest.mark.parametrize("refuses", [False, True])
def test_pinned_memory_is_given_back_after_loading_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    module, content = network(), state()
    path = write(tmp_path / "model.safetensors", content)
    pinning = Pinning(monkeypatch, refuses)

    with open_checkpoint(path) as checkpoint:
        load_module(module, checkpoint, plain_sources(checkpoint), device=CUDA, dtype=same)

    assert pinning.log == (["release"] if refuses else ["pin", "release"])
    assert all(torch.equal(tensor, content[key]) for key, tensor in module.state_dict().items())
