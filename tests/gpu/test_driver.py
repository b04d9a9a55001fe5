"""What CUDA's driver does with host memory: what comments in the product take from its documentation."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modules.checkpoints.filling import load_module
from modules.checkpoints.opening import open_checkpoint, plain_sources
from modules.contract.loading import Placement, TensorInfo
from modules.devices import send_ahead
from modules.offload.host_memory import PIECE, _register, allocate
from modules.offload.swap_plan import SwapPlan, host_weights
from tests.gpu.measuring import equal_bits, poison
from tests.modules.making import write
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit
from wan.spec import DIT

pytestmark = pytest.mark.gpu
MB = 1 << 20


def test_the_error_of_a_refusal_to_lock_memory_is_not_seen_by_the_next_kernel(cuda: torch.device) -> None:
    assert not _register(1 << 46, 1 << 40)  # a terabyte that is not there

    assert torch.arange(4, device=cuda).sum().item() == 6
    torch.cuda.synchronize(cuda)


def test_tensors_of_several_pieces_are_copied_both_ways(cuda: torch.device) -> None:
    infos = {name: TensorInfo(torch.int32, (PIECE // 16,)) for name in "abcdef"}
    held = allocate(infos, pinned=True)

    assert held.unlocked_bytes == 0
    for number, host in enumerate(held.tensors.values()):
        assert host.is_pinned()
        there = torch.full(host.shape, number, dtype=torch.int32, device=cuda)
        host.copy_(there, non_blocking=True)
        back = host.to(cuda, non_blocking=True)
        assert torch.equal(back, there)


@pytest.mark.parametrize("size", [1000, 8 * MB])
def test_what_is_sent_ahead_does_not_wait_for_the_queue(cuda: torch.device, size: int) -> None:
    source = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    send_ahead(source, cuda)  # pinned memory is there from now on
    torch.cuda.synchronize(cuda)

    start = time.perf_counter()
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    sent = send_ahead(source, cuda)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize(cuda)

    assert time.perf_counter() - start > 0.2, "the queue was empty: the test shows nothing"
    assert seconds < 0.1
    assert torch.equal(sent.cpu(), source)


def test_loading_leaves_no_pinned_memory_behind(cuda: torch.device, tmp_path: Path) -> None:
    if not hasattr(torch.cuda, "host_memory_stats"):
        pytest.skip(f"torch {torch.__version__} does not count pinned memory")
    with torch.device("meta"):
        module = nn.Linear(1100, 1000, bias=False)
    path = write(tmp_path / "model.safetensors", {"weight": torch.ones(1000, 1100)})

    def pinned() -> int:
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    before = pinned()
    with open_checkpoint(path) as checkpoint:
        sources = plain_sources(checkpoint)
        load_module(module, checkpoint, sources, device=cuda, dtype=lambda name, stored: stored)

    assert pinned() <= before
    assert module.weight.sum().item() == 1_100_000


@pytest.mark.parametrize("target", [None, torch.float32], ids=["as stored", "float32"])
@pytest.mark.parametrize("dialect", ["safetensors", "pth", "fp8_scaled"])
def test_a_device_and_memory_for_copies_to_it_get_the_bytes_of_the_file(
    cuda: torch.device, tmp_path: Path, dialect: str, target: torch.dtype | None
) -> None:
    """Through one pinned buffer for all tensors."""
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16, num_layers=3), dialect)
    poison(cuda, 1 << 24)
    expected = load_dit(path, Placement(torch.device("cpu"), compute_dtype=target)).state_dict()
    for host in (None, host_weights(SwapPlan(DIT, 0), cuda, whole=True)):
        found = load_dit(path, Placement(cuda, compute_dtype=target, host=host)).state_dict()
        assert found.keys() == expected.keys()
        assert all(equal_bits(found[name], each) for name, each in expected.items())
        if host is None:
            assert all(each.is_cuda for each in found.values())
        else:
            assert all(found[name].data_ptr() == each.data_ptr() for name, each in host.tensors.items())
            assert all(each.is_pinned() for each in host.tensors.values())
