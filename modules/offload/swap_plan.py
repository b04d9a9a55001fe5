"""Which weights of a transformer wait in host memory: arithmetic on numbers of blocks, and names.

`--blocks_to_swap N` leaves the blocks as much memory on the device as all but N of them take, as in the known
tuners. Here some blocks stay for good, and the others pass through a few places that count towards that
memory. Those that pass are spread evenly among those that stay, whose computing hides their way.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from modules.contract.family import DitSpec
from modules.errors import OptionError

SLOTS = 2  # places of a list of blocks on the device: for the block that computes and the one that comes next


@dataclass(frozen=True)
class ListPlan:
    """How the blocks of one list share the device."""

    name: str  # of the nn.ModuleList
    num_blocks: int
    streamed: tuple[int, ...]  # indices of the blocks that come from host memory each time
    slots: int  # places for them on the device

    @property
    def device_blocks(self) -> int:
        """How many blocks' weights lie on the device at most."""
        return self.num_blocks - len(self.streamed) + self.slots


def plan_list(name: str, num_blocks: int, swapped: int) -> ListPlan:
    """Share out one list. swapped: as the option counts, at most num_blocks - 1.

    The device then holds num_blocks - swapped blocks; at the very most swapped, `SLOTS`, so that one can come
    while one computes.
    """
    if swapped == 0:
        return ListPlan(name, num_blocks, (), 0)
    resident = max(num_blocks - swapped - SLOTS, 0)
    count = num_blocks - resident
    streamed = tuple(i for i in range(num_blocks) if (i + 1) * count // num_blocks > i * count // num_blocks)
    return ListPlan(name, num_blocks, streamed, min(SLOTS, count))


def most_blocks(num_blocks: Sequence[int], counts: Callable[[int], Sequence[int]]) -> int:
    """The largest number that --blocks_to_swap can be.

    num_blocks: of each list. counts: `DitSpec.swap_counts`.
    """
    return next(n for n in range(sum(num_blocks), -1, -1) if n == 0 or _fits(num_blocks, counts(n)))


def _fits(num_blocks: Sequence[int], swapped: Sequence[int]) -> bool:
    return all(count <= max(total - 1, 0) for total, count in zip(num_blocks, swapped, strict=True))


@dataclass(frozen=True)
class SwapPlan:
    """What an option record asks for, for transformers of one family."""

    spec: DitSpec
    blocks: int  # --blocks_to_swap
    input_layers: bool = False  # --img_in_txt_in_offloading

    def __bool__(self) -> bool:
        return self.blocks > 0 or self.input_layers

    def lists(self, dit: nn.Module) -> list[ListPlan]:
        """How each list of blocks shares the device.

        Raises OptionError where the network has too few blocks.
        """
        totals = [len(blocks) for blocks in self.spec.blocks(dit).values()]
        swapped = self.spec.swap_counts(self.blocks) if self.blocks else [0] * len(totals)
        if not _fits(totals, swapped):
            most, has = most_blocks(totals, self.spec.swap_counts), " + ".join(map(str, totals))
            raise OptionError(
                f"--blocks_to_swap {self.blocks}: the transformer has {has} blocks, of which at most {most} "
                "can be swapped. "
                f"Use {most} or less"
            )
        return [plan_list(*each) for each in zip(self.spec.block_lists, totals, swapped, strict=True)]

    def names(self, dit: nn.Module) -> list[str]:
        """All weights that are kept in host memory, in the order of their use.

        Raises OptionError as `lists`.
        """
        names = [name for path in self.input_layer_names(dit) for name in big_weights(dit, path)]
        for each in self.lists(dit):
            names += [name for index in each.streamed for name in big_weights(dit, f"{each.name}.{index}")]
        return names

    def input_layer_names(self, dit: nn.Module) -> list[str]:
        """The input layers that are offloaded; those that this variant of the network has."""
        return [name for name in self.spec.input_layers if hasattr(dit, name)] if self.input_layers else []


def big_weights(network: nn.Module, path: str) -> Iterator[str]:
    """Names of the weights in a part of a network that are worth moving: of layers, not biases, norms and
    scales.
    """
    for name, _ in big_layers(network, path):
        yield f"{name}.weight"


def big_layers(network: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the layers in a part of a network that have such weights."""
    for name, module in network.get_submodule(path).named_modules(prefix=path):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            yield name, module
