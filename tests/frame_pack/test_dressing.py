"""What acts on the FramePack transformer from outside by the names in its DitSpec: swap, fp8, compiling, token pieces."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from frame_pack.checkpoints import DIT, load_dit
from modules.activation import checkpoint_blocks
from modules.compile import compile_blocks
from modules.compile_options import Compilation
from modules.fp8_options import Quantisation
from modules.records import Placement
from modules.token_pieces import compute_in_pieces
from tests.frame_pack.making import tiny_inputs, tiny_model
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import swapped
from tests.tiny.framepack_dit import tiny_state, write_dit

SIZES = {"double_blocks": 3, "single_blocks": 7}  # enough to swap
CPU = Placement(torch.device("cpu"))
NEAR = 1e-5  # of the largest value, float32: sums in another order


@pytest.fixture
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would write all of it down
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def results(dit: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradient that arrives at the noisy latents through all blocks."""
    noisy = inputs["noisy"].clone().requires_grad_()
    output = dit(**inputs | {"noisy": noisy})
    output.square().mean().backward()
    assert noisy.grad is not None
    return [output.detach(), noisy.grad]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= NEAR * other.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [1, 4])
def test_swapped_blocks_give_the_same_to_the_bit(blocks: int, checkpointing: bool) -> None:
    expected = results(tiny_model(**SIZES), tiny_inputs())
    dit = tiny_model(**SIZES)
    if checkpointing:
        checkpoint_blocks(dit, DIT)
    swapped(dit, DIT, blocks, FakeDevice())

    found = results(dit.train(checkpointing), tiny_inputs())

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("asked", "counts"), [(1, (0, 3)), (4, (2, 5)), (36, (18, 37)), (38, (19, 39))])
def test_blocks_to_swap_are_spread_over_the_lists_as_in_hunyuanvideo(asked: int, counts: tuple[int, int]) -> None:
    assert DIT.swap_counts(asked) == counts


@pytest.mark.parametrize("kind", ["cast", "rows"])
def test_blocks_in_8_bits_stay_near_and_norms_are_left_alone(tmp_path: Path, kind: str) -> None:
    path = write_dit(tmp_path, tiny_state())

    dit = load_dit(path, replace(CPU, fp8=Quantisation(kind)))

    in_8_bits = {name for name, weight in dit.named_parameters() if weight.dtype.itemsize == 1}
    in_8_bits |= {name for name, tensor in dit.named_buffers() if tensor.dtype.itemsize == 1}
    assert len(in_8_bits) == 2 * (8 + 4) + 3 * 5
    assert not any(".norm" in name for name in in_8_bits)
    expected = load_dit(path, CPU)(**tiny_inputs())
    assert 0 < (dit(**tiny_inputs()) - expected).abs().max() <= 0.15 * expected.abs().max()  # three digits of mantissa


@pytest.mark.usefixtures("_nothing_compiled")
def test_compiled_blocks_share_one_compilation_for_each_list() -> None:
    dit, inputs = tiny_model(), tiny_inputs((7,))
    with torch.no_grad():
        expected = dit(**inputs)
        compile_blocks(dit, DIT, Compilation("eager", fullgraph=True))

        found = dit(**inputs)

    assert counters["stats"]["unique_graphs"] == len(DIT.block_lists)
    assert_near([found], [expected])


def test_feed_forwards_in_pieces_give_the_same() -> None:
    expected = results(tiny_model(), tiny_inputs())
    dit = tiny_model()
    compute_in_pieces(dit, DIT, tokens=8)
    checkpoint_blocks(dit, DIT)

    assert_near(results(dit.train(), tiny_inputs()), expected)
