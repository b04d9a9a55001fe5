"""What checkpoints compute again and keep, inputs of blocks in host memory, feed-forwards in pieces.

A transfer of the tests copies as late as it may and spoils what nobody may read any more. Pieces are small
matrices, whose products may be summed in another order.
"""

import collections
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modules.compile_options import Compilation
from runtime.compile import compile_blocks
from runtime.offload.checkpointing import Offload, checkpoint_blocks, compute_in_pieces
from runtime.offload.host_memory import Pairs, Transfer
from tests.tiny.dits import DITS, ONE_OF_EACH, TinyDit, gradients

# in each block, and those to a text of few tokens; HunyuanVideo and FramePack compute samples of different
# lengths one by one; Z-Image's are padded to equal lengths
ATTENTIONS = {
    **dict.fromkeys(("hunyuan t2v", "framepack", "flux dev", "flux chroma", "lumina"), (2, 0)),
    **dict.fromkeys(("hunyuan_image", "qwen_image", "qwen_image edit", "krea2"), (2, 0)),
    **dict.fromkeys(("z_image", "flux_2"), (1, 0)),  # all tokens of FLUX.2 count
    "flux_3": (1.5, 0),  # one in the blocks of pictures and references, two where there are texts
    **dict.fromkeys(
        ("ltx_2 2.0", "ltx_2 2.3", "ltx_2 2.5"), (6, 2)
    ),  # short to the video: its text, and sound
    # of the picture, and of what stands before it: text, with a reference text, the reference and text
    **{"qwen_image_21": (4, 0), "qwen_image_21 edit": (8, 0)},
    **{"krea2 edit": (3, 0), "wan t2v": (2, 1), "wan i2v": (3, 1), "wan vace": (2, 1)},
    **{"moss_image": (2, 0), "moss_image edit": (3, 0)},
    **dict.fromkeys(("fibo_2", "fibo_2 edit", "ernie_image", "ideogram4"), (2, 0)),
    "anima": (2, 0),
    # of each of two samples to everything, and of their texts to themselves
    **dict.fromkeys(("hidream_o1", "hidream_o1 edit"), (3, 0)),
    "hunyuan_video_15": (2, 0),
    # of each stream to itself and to the other, and for each of two samples to its text
    "kandinsky_6": (8, 4),
    "kandinsky": (3, 2),  # to the clip, and for each of two samples to few tokens of its text
}
LEARNS_BEFORE = {
    "hidream_o1",
    "hidream_o1 edit",
    "lumina",
    "krea2",
    "krea2 edit",
}  # a LoRA is in their refiners or embeddings too


class Counter(TorchDispatchMode):
    """Counts operators as they are really computed, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def attentions(self) -> int:
        names = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax", "aten::_safe_softmax")
        return sum(self.counts[name] for name in names)


# in bf16 attention to few tokens is written out on a CPU
BOTH_DTYPES = [pytest.param(tiny, False, id=tiny.name) for tiny in DITS]
BOTH_DTYPES += [pytest.param(tiny, True, id=f"{tiny.name} autocast") for tiny in ONE_OF_EACH]


@pytest.mark.slow_cases(
    "anima",
    "ernie_image",
    "hidream_o1",
    "hidream_o1 edit",
    "fibo_2 edit",
    "fibo_2",
    "flux chroma",
    "flux dev",
    "flux_2",
    "flux_3",
    "framepack autocast",
    "framepack",
    "hunyuan t2v autocast",
    "hunyuan t2v",
    "hunyuan_image",
    "ideogram4",
    "krea2 edit",
    "krea2",
    "ltx_2 2.0",
    "ltx_2 2.3",
    "ltx_2 2.5",
    "lumina",
    "moss_image edit",
    "moss_image",
    "qwen_image edit",
    "qwen_image",
    "qwen_image_21 edit",
    "qwen_image_21",
    "wan i2v",
    "wan t2v autocast",
    "wan t2v",
    "wan vace",
)
@pytest.mark.parametrize(("tiny", "autocast"), BOTH_DTYPES)
def test_attention_that_is_kept_is_computed_once_and_gradients_are_the_same(
    tiny: TinyDit, autocast: bool
) -> None:
    inputs, results, calls = tiny.inputs((4, 8, 8, 5), 2), [], []
    for keep in (None, False, True):
        dit, network = tiny.with_lora(2, neuron_dropout=0.2)
        if keep is not None:
            checkpoint_blocks(dit, tiny.spec, keep_attention=keep)
        network.set_dropout_seed(5)
        with Counter() as counter:
            velocity, found = gradients(dit.train(), network, inputs, autocast)
        results.append([velocity, *found])
        calls.append(counter.attentions())

    plain, checkpointed, kept = calls
    blocks = sum(len(dit.get_submodule(name)) for name in tiny.spec.block_lists)
    if tiny.name == "wan vace":  # nothing learns in its first main block, nor before it
        blocks -= 1
    each, to_short_text = ATTENTIONS[tiny.name]
    assert checkpointed == plain + each * blocks
    # computed again: all of the first block, whose input needs no gradient if nothing before it learns, and
    # attention to short text by a kernel
    first = 0 if tiny.name in LEARNS_BEFORE else int(each)
    assert kept == plain + first + (0 if autocast else to_short_text * (blocks - 1))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_without_gradients_or_train_mode_blocks_run_once() -> None:
    counts = []
    for is_checkpointed in (False, True):
        dit, network = DITS[0].with_lora(2)
        if is_checkpointed:
            checkpoint_blocks(dit, DITS[0].spec)
        with Counter() as counter:
            with torch.no_grad():
                dit.train()(**DITS[0].inputs(SIZE, 1))
            gradients(dit.eval(), network, DITS[0].inputs(SIZE, 1))
        counts.append(counter.attentions())

    assert counts[0] == counts[1] > 0


SIZE, LARGER = (2, 4, 6, 9), (3, 6, 8, 11)


class LateTransfer(Transfer):
    """A copy happens when it is waited for; the source of a saved one is spoilt then, as memory that is used
    for something else.
    """

    def __init__(self) -> None:
        self.actions: list[str] = []
        self._pieces: list[int] = []  # addresses of host memory, in the order of their making
        self._waiting: list[tuple[str, int, Tensor, Tensor]] = []

    def make(self, size_bytes: int) -> Tensor:
        piece = torch.full((size_bytes,), 255, dtype=torch.uint8)  # as numbers: NaN
        self._pieces.append(piece.data_ptr())
        return piece

    def allocate(self, size_bytes: int) -> Tensor:
        raise AssertionError("such memory is held back by the stream of the copies")

    def record_event(self) -> str:
        return "now"

    def copy(self, pairs: Pairs, after: Any) -> int:
        assert after == "now"
        ((target, source),) = pairs
        leaves = target.data_ptr() in self._pieces
        kind, piece = ("save", target) if leaves else ("fetch", source)
        number = self._pieces.index(piece.data_ptr())
        self.actions.append(f"{kind} {number}")
        target.fill_(math.nan)
        self._waiting.append((kind, number, target, source))
        return len(self._waiting)

    def wait(self, moment: int) -> None:
        kind, number, target, source = self._waiting[moment - 1]
        self.actions.append(f"{kind.rstrip('e')}ed {number}")
        target.copy_(source)
        if kind == "save":
            source.data.fill_(math.nan)

    def finish(self) -> None:
        raise AssertionError("nothing waits on the host")


def away() -> tuple[Offload, LateTransfer]:
    transfer = LateTransfer()
    return Offload(transfer, transfer.make), transfer


def dressed(tiny: TinyDit, offload: Offload | None, blocks: int = 3) -> tuple[nn.Module, Any]:
    dit, network = tiny.with_lora(blocks)
    checkpoint_blocks(dit.train(), tiny.spec, offload=offload)
    return dit, network


def test_inputs_leave_while_their_block_computes_and_come_back_one_block_ahead() -> None:
    tiny, (offload, transfer) = DITS[0], away()
    dit, network = dressed(tiny, offload, blocks=4)

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert transfer.actions == [
        *("save 0", "saved 0", "save 1", "saved 1", "save 2"),  # the input of the last block stays
        # the third block is differentiated while the second's input comes
        *("saved 2", "fetch 2", "fetched 2", "fetch 1"),
        *("fetched 1", "fetch 0"),
        "fetched 0",
    ]


def test_two_forward_passes_may_stand_before_their_backward_passes() -> None:
    tiny, results = DITS[0], []
    for offload in (None, away()[0]):
        dit, network = dressed(tiny, offload)
        losses = [dit(**tiny.inputs(size, 1)).square().mean() for size in (SIZE, LARGER)]
        for loss in losses:
            loss.backward()
        results.append([parameter.grad for parameter in network.parameters()])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_pass_that_is_given_up_gives_its_memory_back() -> None:
    tiny, (offload, _) = DITS[0], away()
    dit, network = dressed(tiny, offload)
    dit(**tiny.inputs(SIZE, 1))  # nothing is differentiated
    size = offload.memory.size_bytes

    gradients(dit, network, tiny.inputs(SIZE, 1))

    assert offload.memory.size_bytes == size


def test_what_was_sent_for_and_is_not_used_is_waited_for() -> None:
    """A backward pass that goes only half of the way: the memory of a copy may not be used for something else
    before its end.
    """
    offload, transfer = away()
    x = torch.ones(2, 2, requires_grad=True)
    with offload.hooks():
        first = x.square()
        second = first.clone().square()
    transfer.actions.clear()

    torch.autograd.grad(second.sum(), first)
    assert transfer.actions[-1] == "fetch 0"
    del first, second

    assert transfer.actions[-1] == "fetched 0"


VIDEO = (3, 8, 8, 7)  # 48 video tokens
PIECE = 17  # three pieces of 16
FLOAT32, BF16 = 1e-5, 0.02  # of the largest number: other orders of sums; a few roundings of 1/256


def results(
    tiny: TinyDit, pieces: bool, autocast: bool = False, backend: str = "", **arguments: Any
) -> list[Tensor]:
    """Velocity and gradients of LoRAs in checkpointed blocks."""
    dit, network = tiny.with_lora(2, **arguments)
    if pieces:
        compute_in_pieces(dit, tiny.spec, PIECE)
    if backend:
        compile_blocks(dit, tiny.spec, Compilation(backend, fullgraph=True))
    checkpoint_blocks(dit, tiny.spec)
    network.set_dropout_seed(3)
    velocity, found = gradients(dit.train(), network, tiny.inputs(VIDEO, 2), autocast)
    return [velocity, *found]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
    apart = [(one - other).abs().max() for one, other in zip(ours, theirs, strict=True)]
    assert apart[0] <= share * theirs[0].abs().max()
    assert max(apart[1:]) <= share * max(one.abs().max() for one in theirs[1:])


@pytest.mark.slow_cases(
    "anima",
    "flux chroma",
    "framepack autocast",
    "framepack",
    "hunyuan t2v autocast",
    "hunyuan_image",
    "krea2 edit",
    "ltx_2 2.0",
    "ltx_2 2.3",
    "ltx_2 2.5",
    "qwen_image edit",
    "wan i2v",
    "wan vace",
)
@pytest.mark.parametrize(("tiny", "autocast"), BOTH_DTYPES)
def test_outputs_and_gradients_are_those_of_whole_inputs(tiny: TinyDit, autocast: bool) -> None:
    assert_alike(results(tiny, True, autocast), results(tiny, False, autocast), BF16 if autocast else FLOAT32)


def test_all_weights_may_learn() -> None:
    tiny, found = DITS[0], []
    for pieces in (False, True):
        dit = tiny.make(2).requires_grad_(True)
        if pieces:
            compute_in_pieces(dit, tiny.spec, PIECE)
        checkpoint_blocks(dit, tiny.spec)
        velocity, grads = gradients(dit.train(), dit, tiny.inputs(VIDEO, 2))
        found.append([velocity, *grads])
    assert_alike(found[1], found[0], FLOAT32)


@pytest.mark.slow_cases("hunyuan t2v-attention kept", "hunyuan t2v-nothing kept", "wan t2v-nothing kept")
@pytest.mark.parametrize("keep", [False, True], ids=["nothing kept", "attention kept"])
@pytest.mark.parametrize("tiny", ONE_OF_EACH[:2], ids=lambda dit: dit.name)
def test_nothing_is_computed_a_third_time(tiny: TinyDit, keep: bool) -> None:
    flops = []
    for pieces in (False, True):
        dit, network = tiny.with_lora(2)
        if pieces:
            compute_in_pieces(dit, tiny.spec, PIECE)
        checkpoint_blocks(dit, tiny.spec, keep)
        with FlopCounterMode(display=False) as counter:
            gradients(dit.train(), network, tiny.inputs(VIDEO, 1))
        flops.append(counter.get_total_flops())
    assert flops[1] <= flops[0]


@pytest.mark.parametrize(("kind", "share"), [("rank_dropout", "0.3"), ("module_dropout", "0.5")])
def test_dropped_ranks_and_modules_are_the_same_in_all_pieces(kind: str, share: str) -> None:
    found, expected = (results(DITS[0], pieces, **{kind: share}) for pieces in (True, False))
    assert_alike(found, expected, FLOAT32)


def test_dropout_of_single_values_sees_whole_inputs() -> None:
    """Its masks follow from the numbers of the elements and would be the same in every piece."""
    found, expected = (results(DITS[0], pieces, neuron_dropout=0.3) for pieces in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("backend", "tiny"),
    [
        ("eager", DITS[0]),
        pytest.param("aot_eager", DITS[0], marks=pytest.mark.slow),
        pytest.param("eager", DITS[2], marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_give_the_same(backend: str, tiny: TinyDit) -> None:
    assert_alike(results(tiny, True, backend=backend), results(tiny, False), FLOAT32)
