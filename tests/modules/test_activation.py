import torch
from torch import Tensor, nn

from modules.activation import checkpoint_blocks
from modules.family import DitSpec


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


def test_a_forward_replaced_before_is_the_one_that_runs() -> None:
    net = Net().eval()
    linear = net.first[0].linear  # as a LoRA does it
    linear.forward = lambda x: torch.zeros_like(x)
    checkpoint_blocks(net, SPEC)

    x = torch.ones(1, 4)
    assert torch.equal(net.first[0](x, {"scale": torch.ones(())}), x)
