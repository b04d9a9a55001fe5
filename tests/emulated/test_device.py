"""The emulated device is as strict as a GPU, and sees what makes the host wait."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.commands import QUIET, ROOT
from tests.emulated_cuda.pairs import own_environment

PROGRAM = """
from tests.emulated_cuda import loading
loading.compile_it()
loading.load()

import json
import torch
import torch.nn.functional as functional
from tests.emulated_cuda.device import switch_on

device = switch_on()
cuda = torch.device("cuda")
here, host = torch.arange(12.0, device=cuda).view(3, 4), torch.arange(12.0).view(3, 4)
bytes_before = torch.cuda.memory_allocated()


def said(work):
    try:
        return str(work())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def waits(work):
    with device.recording() as found:
        work()
    return [f"{each.kind} {each.operation}".strip() for each in found]


def gradient(where):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 5), torch.randn(1, 2, 6, 4)
    layer.to(where)
    y = functional.layer_norm(functional.silu(layer(x.to(where))), (5,))
    functional.scaled_dot_product_attention(y, y, y).square().mean().backward()
    return layer.weight.grad.cpu()


pinned = torch.empty(3, pin_memory=True)
eight = here.to(torch.float8_e4m3fn)
results = {
    "sum": said(lambda: here + host),
    "product": said(lambda: here @ host.T),
    "joined": said(lambda: torch.cat([here, host])),
    "own host index": said(lambda: here.index_select(0, torch.tensor([0]))),
    "number": said(lambda: (here * torch.tensor(2.0)).device),
    "numpy": said(lambda: here.numpy()),
    "other generator": said(lambda: torch.randn(2, device=cuda, generator=torch.Generator())),
    "own generator": said(lambda: torch.randn(2, device=cuda, generator=torch.Generator(cuda)).device),
    "integers": said(lambda: here.long() @ here.long().T),
    "eight bits": said(lambda: eight + eight),
    "eight bits cast": said(lambda: eight.float().device),
    "pinned on device": said(lambda: torch.empty(2, device=cuda, pin_memory=True)),
    "pinned": said(lambda: (pinned.is_pinned(), host.is_pinned(), host.pin_memory().is_pinned())),
    "gradients": said(lambda: torch.equal(gradient(cuda), gradient(torch.device("cpu")))),
    "view": said(lambda: here.view(-1)[4:8].fill_(0).sum().item() + here[1].sum().item()),
    "memory": said(lambda: torch.cuda.memory_allocated() - bytes_before),
    "waits item": waits(lambda: here.sum().item()),
    "waits mask": waits(lambda: here[here > 2]),
    "waits made": waits(lambda: torch.tensor([1.0, 2.0], device=cuda)),
    "waits home": waits(lambda: here.cpu()),
    "waits truth": waits(lambda: bool(here.any())),
    "waits synchronize": waits(lambda: torch.cuda.synchronize()),
    "waits ahead": waits(lambda: host.to(cuda, non_blocking=True)),
    "waits pinned": waits(lambda: pinned.copy_(here[0, :3], non_blocking=True)),
    "waits pageable": waits(lambda: torch.empty(3).copy_(here[0, :3], non_blocking=True)),
    "waits none": waits(lambda: functional.layer_norm(here @ here.T, (3,)).clamp(min=0)),
}
print(json.dumps(results), flush=True)
"""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**own_environment(), **QUIET},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


MIXED = "RuntimeError: Expected all tensors to be on the same device, but found at least two devices"


def test_operands_must_be_there(results: dict[str, Any]) -> None:
    for name in ("sum", "product", "joined", "own host index"):
        assert results[name].startswith(MIXED), (name, results[name])
    assert results["number"] == "cuda:0"


def test_what_a_gpu_refuses_is_refused(results: dict[str, Any]) -> None:
    assert results["numpy"].startswith("TypeError: can't convert cuda:0 device type tensor to numpy")
    assert "Expected a 'cuda' device type for generator" in results["other generator"]
    assert "not implemented for 'Long'" in results["integers"]
    assert "not implemented for 'Float8_e4m3fn'" in results["eight bits"]
    assert "Only dense CPU tensors can be pinned" in results["pinned on device"]
    assert results["own generator"] == results["eight bits cast"] == "cuda:0"
    assert results["pinned"] == "(True, False, True)"


def test_it_computes_as_the_cpu(results: dict[str, Any]) -> None:
    assert results["gradients"] == "True"
    assert results["view"] == "0.0"
    assert int(results["memory"]) >= 0


def test_waits_are_seen(results: dict[str, Any]) -> None:
    assert results["waits item"] == ["reads the device aten::_local_scalar_dense"]
    assert results["waits mask"] == ["reads the device aten::nonzero"]
    assert results["waits made"] == ["copy to the device [2]"]
    assert results["waits home"] == ["copy to the host [3, 4]"]
    assert results["waits truth"] == ["reads the device aten::_local_scalar_dense"]
    assert results["waits synchronize"] == ["synchronize device"]
    assert results["waits pageable"] == ["copy to pageable memory of the host [3]"]
    for name in ("ahead", "pinned", "none"):
        assert results[f"waits {name}"] == [], name
