import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modules.contract.family import DitSpec
from modules.offload.checkpointing import checkpoint_blocks
from tests.tiny.dits import DITS, TinyDit, gradients


class Block(nn.Module):
    """Counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return x + self.dropout(self.linear(x)).tanh() * extra["scale"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([Block(), Block()])
        self.second = nn.ModuleList([Block()])
        self.rest = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.first, *self.second, *self.rest]:
            x = block(x, {"scale": torch.tensor(0.5)})
        return x

    @property
    def calls(self) -> list[int]:
        return [block.calls for block in [*self.first, *self.second, *self.rest]]


SPEC = DitSpec(block_lists=("first", "second"))


def test_blocks_are_computed_again_in_the_backward_pass_with_the_same_dropout() -> None:
    torch.manual_seed(0)
    plain, wrapped = Net(), Net()
    wrapped.load_state_dict(plain.state_dict())
    checkpoint_blocks(wrapped, SPEC)
    gradients = []
    for net in (plain, wrapped):
        torch.manual_seed(1)
        net(torch.ones(3, 4)).sum().backward()
        gradients.append([weight.grad for weight in net.parameters()])

    assert plain.calls == [1, 1, 1, 1]
    assert wrapped.calls == [2, 2, 2, 1]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_without_gradients_or_train_mode_blocks_run_once() -> None:
    net = Net()
    checkpoint_blocks(net, SPEC)

    with torch.no_grad():
        net(torch.ones(1, 4))
    net.eval()(torch.ones(1, 4)).sum().backward()

    assert net.calls == [2, 2, 2, 2]


# in each block, and those to a text of few tokens; HunyuanVideo and FramePack compute samples of different
# lengths one by one
ATTENTIONS = {"wan t2v": (2, 1), "wan i2v": (3, 1), "hunyuan t2v": (2, 0), "framepack": (2, 0)}
ATTENTIONS |= {"flux dev": (2, 0), "flux chroma": (2, 0), "lumina": (2, 0)}
ATTENTIONS["hunyuan_image"] = ATTENTIONS["hunyuan t2v"]  # whose blocks it has
LEARNS_BEFORE = {"lumina"}  # a LoRA is in its refiners too


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


@pytest.mark.parametrize("autocast", [False, True])  # in bf16 attention to few tokens is written out on a CPU
@pytest.mark.parametrize("tiny", DITS, ids=lambda dit: dit.name)
def test_attention_that_is_kept_is_computed_once_and_gradients_are_the_same(
    tiny: TinyDit, autocast: bool
) -> None:
    inputs, results, calls = tiny.inputs((4, 8, 8, 5), 2), [], []
    for checkpoints in (False, True):
        for keep in (False, True) if checkpoints else (False,):
            dit, network = tiny.with_lora(neuron_dropout=0.2)
            if checkpoints:
                checkpoint_blocks(dit, tiny.spec, keep_attention=keep)
            network.set_dropout_seed(5)
            with Counter() as counter:
                results.append(gradients(dit.train(), network, inputs, autocast))
            calls.append(counter.attentions())

    plain, checkpointed, kept = calls
    blocks = sum(len(dit.get_submodule(name)) for name in tiny.spec.block_lists)
    each, to_short_text = ATTENTIONS[tiny.name]
    assert checkpointed == plain + each * blocks
    # computed again: all of the first block, whose input needs no gradient if nothing before it learns, and
    # attention to short text by a kernel
    first = 0 if tiny.name in LEARNS_BEFORE else each
    assert kept == plain + first + (0 if autocast else to_short_text * (blocks - 1))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert all(torch.equal(one, two) for one, two in zip(results[1][1], other[1], strict=True))
