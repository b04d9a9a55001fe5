"""Compilation, fp8 weights, block swap, inputs in host memory and kept attention, all at once."""

import pytest
import torch
from torch import Tensor, nn

from modules.compile import compile_blocks
from modules.compile_options import Compilation
from modules.fp8.weights import attach, quantise
from modules.offload.checkpointing import checkpoint_blocks
from modules.speed_options import Quantisation
from tests.modules.fake_device import FakeDevice
from tests.modules.offload.test_activations import away
from tests.modules.swap_cases import CASES, Case, swapped
from tests.networks.making import randomize
from tests.tiny.dits import ONE_OF_EACH, TinyDit, gradients
from tests.tiny.loras import make_lora

ROWS = Quantisation("rows")
TINY = dict(zip(("wan", "hunyuan", "framepack"), ONE_OF_EACH, strict=True))
SIZES = ((1, 4, 4, 7), (2, 4, 6, 9))


pytestmark = pytest.mark.usefixtures("nothing_compiled")


def quantised(tiny: TinyDit) -> nn.Module:
    dit = tiny.make(5)
    for layer in [part for name in tiny.spec.block_lists for part in dit.get_submodule(name).modules()]:
        if isinstance(layer, nn.Linear):
            attach(layer, *quantise(layer.weight.data, ROWS), ROWS)
    return dit


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_those_of_a_network_that_stays_on_the_device(case: Case, compiled: bool) -> None:
    tiny = TINY[case.name]
    results: list[list[Tensor]] = []
    for saves in (False, True):
        dit = quantised(tiny)
        with torch.random.fork_rng():
            network = make_lora(tiny.lora, 4, 2.0, dit, neuron_dropout=0.2)
        randomize(network)
        network.attach()
        if compiled:
            compile_blocks(dit, tiny.spec, Compilation("eager", fullgraph=True))
        checkpoint_blocks(dit, tiny.spec, keep_attention=saves, offload=away()[0] if saves else None)
        if saves:
            swapped(dit, case.spec, 2, FakeDevice())
        results.append([])
        for step, size in enumerate(SIZES):
            network.set_dropout_seed(step)
            velocity, found = gradients(dit.train(), network, tiny.inputs(size, 1), autocast=True)
            results[-1] += [velocity, *found]

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(torch.isfinite(one).all() for one in results[0])
