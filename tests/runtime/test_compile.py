"""Compiled blocks: one compilation for all blocks of a list, few for many sizes, and the numbers of
uncompiled ones.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from checkpoints.stored.forms import QuantizationFormat, attach
from checkpoints.stored.fp8 import Fp8
from checkpoints.stored.int8 import Int8
from checkpoints.stored.nf4 import Nf4
from modules.compile_options import Compilation
from modules.errors import OptionError
from modules.speed_options import Quantization
from runtime.compile import check_compilation, compile_blocks
from runtime.offload.checkpointing import checkpoint_blocks, offload_to_host
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit, gradients

# torch's own kernels, called by what Dynamo has captured: an error where it cannot
EAGER = Compilation("eager", fullgraph=True)
CPU = torch.device("cpu")
SIZES = ((1, 4, 4, 7), (2, 4, 6, 9), (3, 12, 16, 40), (2, 8, 6, 5))
# of the largest number, float32; rotary turns are multiplied out in another order, inductor's sums too
ROUNDING = 1e-5
BF16 = 0.02  # a few roundings of 1/256
DROPOUTS = ({"neuron_dropout": 0.3}, {"rank_dropout": "0.3"}, {"module_dropout": "0.5"})
DAILY = ("wan t2v", "hunyuan t2v", "lumina")  # one list of blocks, two, and texts among the tokens
TINY = [pytest.param(dit, id=dit.name, marks=[] if dit.name in DAILY else [pytest.mark.slow]) for dit in DITS]

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> TinyDit:
    return request.param


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def forms_of(tiny: TinyDit) -> int:
    """Lists of blocks; the first block of a second stream has a layer more, some of Fibo 2.0 read texts."""
    return len(tiny.spec.block_lists) + (bool(tiny.spec.side_list) or tiny.lora == "lora_fibo_2")


def compile_and_train(tiny: TinyDit, dit: nn.Module) -> None:
    compile_blocks(dit, tiny.spec, EAGER)
    checkpoint_blocks(dit, tiny.spec)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, share: float = ROUNDING) -> None:
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


def assert_equal_gradients(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], share: float = ROUNDING
) -> None:
    largest = max(one.abs().max() for one in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= share * largest


@pytest.mark.slow_cases("hunyuan t2v", "lumina")
def test_all_blocks_of_a_list_share_one_compilation_also_when_sizes_change(tiny: TinyDit) -> None:
    dit = tiny.make(3)
    compile_blocks(dit, tiny.spec, EAGER)

    counts = []
    with torch.no_grad():
        for size in SIZES:
            dit(**tiny.inputs(size, 1))
            counts.append(compilations())

    assert counts[0] == forms_of(tiny)
    assert counts[-1] == 2 * forms_of(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda dit: dit.name)
def test_learning_blocks_share_theirs_when_sizes_and_dropout_change(tiny: TinyDit) -> None:
    dit, network = tiny.with_lora(blocks=3, neuron_dropout=0.1)
    compile_and_train(tiny, dit.train())
    forms = len(tiny.spec.block_lists) + 1  # the first block is given tokens that need no gradient

    counts = []
    for step, size in enumerate(SIZES):
        network.set_dropout_seed(step)
        gradients(dit, network, tiny.inputs(size, 1))
        counts.append(compilations())

    assert counts == [forms, 2 * forms, 2 * forms, 2 * forms]


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [Fp8(Quantization("rows")), Fp8(Quantization("rows", float32_linear=True)), Int8(), Nf4()],
    ids=["fp8", "float32", "int8", "nf4"],
)
@pytest.mark.parametrize("tiny", ONE_OF_EACH, ids=lambda dit: dit.name)
def test_blocks_of_stored_weights_share_theirs_and_keep_their_numbers(
    tiny: TinyDit, form: QuantizationFormat
) -> None:
    results = []
    for compiled in (False, True):
        dit = tiny.make(3)
        for layer in [part for name in tiny.spec.block_lists for part in dit.get_submodule(name).modules()]:
            if isinstance(layer, nn.Linear):
                attach(layer, form.quantize(layer.weight.data))
        if compiled:
            compile_blocks(dit, tiny.spec, EAGER)
        with torch.no_grad():
            results.append(dit(**tiny.inputs(SIZES[0], 1)))

    assert compilations() == len(tiny.spec.block_lists)
    assert_near(results[1], results[0])


def test_open_sizes_are_compiled_once() -> None:
    tiny = DITS[0]
    dit = tiny.make(2)
    compile_blocks(dit, tiny.spec, Compilation("eager", dynamic=True, fullgraph=True))

    with torch.no_grad():
        for size in SIZES:
            dit(**tiny.inputs(size, 1))

    assert compilations() == 1


@pytest.mark.slow_cases("hunyuan t2v-False", "lumina-False")
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_numbers_are_those_of_uncompiled_blocks(tiny: TinyDit, autocast: bool) -> None:
    """The eager back end calls the same kernels; only the rotary turns are multiplied out.

    In bf16 their roundings are its own. With checkpoints that keep attention and wait on the host.
    """
    results = []
    for compiled in (False, True):
        dit, network = tiny.with_lora()
        if compiled:
            compile_blocks(dit, tiny.spec, EAGER)
            checkpoint_blocks(dit, tiny.spec, True, offload_to_host(CPU))
        results.append(gradients(dit.train(), network, tiny.inputs(SIZES[1], 2), autocast))

    # one more where the first block's tokens need no gradient
    assert compilations() - forms_of(tiny) in {0, 1}
    (velocity, expected), (compiled_velocity, found) = results
    assert_near(compiled_velocity, velocity, BF16 if autocast else ROUNDING)
    assert_equal_gradients(found, expected, BF16 if autocast else ROUNDING)


@pytest.mark.slow_cases("neuron_dropout")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(each, id=next(iter(each)), marks=[pytest.mark.slow] * ("neuron_dropout" not in each))
        for each in DROPOUTS
    ],
)
def test_dropout_masks_are_those_of_uncompiled_blocks_and_change_with_the_seed(
    arguments: dict[str, float],
) -> None:
    tiny = DITS[0]
    results: list[list[list[torch.Tensor]]] = []
    for compiled in (False, True):
        dit, network = tiny.with_lora(blocks=2, **arguments)
        if compiled:
            compile_and_train(tiny, dit)
        results.append([])
        for seed in (1, 2):
            network.set_dropout_seed(seed)
            results[-1].append(gradients(dit.train(), network, tiny.inputs(SIZES[0], 2))[1])

    for plain, compiled_ones in zip(*results, strict=True):
        assert_equal_gradients(compiled_ones, plain)
    differences = [(one - other).abs().max() for one, other in zip(*results[1], strict=True)]
    assert max(differences) > 0.01 * max(map(torch.max, results[1][0]))
    assert compilations() == 2  # the first block and the others: not one for each seed


@pytest.mark.slow_cases("hunyuan t2v-True", "wan t2v-True")
@pytest.mark.parametrize("keep", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("tiny", [each for each in TINY if each.values[0] in ONE_OF_EACH])
def test_checkpoints_that_wait_on_the_host_or_keep_attention_give_the_same_bits(
    tiny: TinyDit, keep: bool
) -> None:
    results = []
    for saves in (False, True):
        dit, network = tiny.with_lora(blocks=2, neuron_dropout=0.2)
        compile_blocks(dit, tiny.spec, EAGER)
        checkpoint_blocks(dit, tiny.spec, saves and keep, offload_to_host(CPU) if saves else None)
        network.set_dropout_seed(3)
        velocity, found = gradients(dit.train(), network, tiny.inputs(SIZES[1], 2))
        results.append([velocity, *found])

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["ofi", "nvprims_nvfuser", "nonsense"])
def test_a_backend_that_is_not_installed_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(OptionError, match=rf"no backend {name} here.*eager.*inductor"):
        check_compilation(Compilation(name), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may be there")
def test_inductor_without_triton_is_refused_for_a_gpu() -> None:
    with pytest.raises(OptionError, match="for cuda needs"):
        check_compilation(Compilation(), torch.device("cuda"))


def test_inductor_without_a_compiler_is_refused_for_a_cpu() -> None:
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()

    # not monkeypatch, which would delete the setting afterwards
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(OptionError, match=r"for cpu needs .*C\+\+ compiler"),
    ):
        check_compilation(Compilation(), CPU)
    torch._inductor.cpp_builder.cpp_compiler_search.cache_clear()
