"""Feed-forwards in pieces give what whole ones give.

Pieces are small matrices, whose products may be summed in another order.
"""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modules.compile import compile_blocks
from modules.compile_options import Compilation
from modules.offload.checkpointing import checkpoint_blocks, compute_in_pieces
from modules.speed_options import Quantisation
from tests.networks.making import randomize
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit, gradients
from tests.tiny.loras import make_lora

SIZE = (3, 8, 8, 7)  # 48 video tokens
PIECE = 17  # three pieces of 16
FLOAT32, BF16 = 1e-5, 0.02  # of the largest number: other orders of sums; a few roundings of 1/256
ROWS = Quantisation("rows")


def results(
    tiny: TinyDit,
    pieces: bool,
    autocast: bool = False,
    dit: nn.Module | None = None,
    backend: str = "",
    **arguments: Any,
) -> list[Tensor]:
    """Velocity and gradients of LoRAs in checkpointed blocks."""
    if dit is None:
        dit, network = tiny.with_lora(**arguments)
    else:
        with torch.random.fork_rng():
            network = make_lora(tiny.lora, 4, 2.0, dit, **arguments)
        randomize(network)
        network.attach()
    if pieces:
        compute_in_pieces(dit, tiny.spec, PIECE)
    if backend:
        compile_blocks(dit, tiny.spec, Compilation(backend, fullgraph=True))
    checkpoint_blocks(dit, tiny.spec)
    network.set_dropout_seed(3)
    velocity, found = gradients(dit.train(), network, tiny.inputs(SIZE, 2), autocast)
    return [velocity, *found]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    assert (ours[0] - theirs[0]).abs().max() <= share * theirs[0].abs().max()
    largest = max(one.abs().max() for one in theirs[1:])
    assert (
        max((one - other).abs().max() for one, other in zip(ours[1:], theirs[1:], strict=True))
        <= share * largest
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("tiny", DITS, ids=lambda dit: dit.name)
def test_outputs_and_gradients_are_those_of_whole_inputs(tiny: TinyDit, autocast: bool) -> None:
    assert_alike(results(tiny, True, autocast), results(tiny, False, autocast), BF16 if autocast else FLOAT32)


@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda dit: dit.name)
def test_all_weights_may_learn(tiny: TinyDit) -> None:
    found = []
    for pieces in (False, True):
        dit = tiny.make(2).requires_grad_(True)
        if pieces:
            compute_in_pieces(dit, tiny.spec, PIECE)
        checkpoint_blocks(dit, tiny.spec)
        velocity, grads = gradients(dit.train(), dit, tiny.inputs(SIZE, 2))
        found.append([velocity, *grads])
    assert_alike(found[1], found[0], FLOAT32)


@pytest.mark.parametrize("keep", [False, True], ids=["nothing kept", "attention kept"])
@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda dit: dit.name)
def test_nothing_is_computed_a_third_time(tiny: TinyDit, keep: bool) -> None:
    flops = []
    for pieces in (False, True):
        dit, network = tiny.with_lora()
        if pieces:
            compute_in_pieces(dit, tiny.spec, PIECE)
        checkpoint_blocks(dit, tiny.spec, keep)
        with FlopCounterMode(display=False) as counter:
            gradients(dit.train(), network, tiny.inputs(SIZE, 1))
        flops.append(counter.get_total_flops())
    assert flops[1] <= flops[0]


@pytest.mark.parametrize(
    "share", [{"rank_dropout": "0.3"}, {"module_dropout": "0.5"}], ids=["rank", "module"]
)
def test_dropped_ranks_and_modules_are_the_same_in_all_pieces(share: dict[str, str]) -> None:
    assert_alike(results(DITS[0], True, **share), results(DITS[0], False, **share), FLOAT32)


def test_dropout_of_single_values_sees_whole_inputs() -> None:
    """Its masks follow from the numbers of the elements and would be the same in every piece."""
    found, expected = (results(DITS[0], pieces, neuron_dropout=0.3) for pieces in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("backend", "tiny"),
    [
        ("eager", DITS[0]),
        pytest.param("aot_eager", DITS[0], marks=pytest.mark.slow),
        pytest.param("eager", DITS[2], marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch, backend: str, tiny: TinyDit) -> None:
    # pytest would write all of it down
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    found = results(tiny, True, backend=backend)
    torch.compiler.reset()
    assert_alike(found, results(tiny, False), FLOAT32)
