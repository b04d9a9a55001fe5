"""What `--network_args` of a family's LoRA module mean, beside those that every LoRA has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modules.errors import OptionError
from networks.lora_blocks import fused_heights

Words = tuple[str, ...]  # all of them are parts of a module's path


@dataclass(frozen=True)
class LoraRules:
    """Modules that a family's LoRA takes, and the arguments that choose among them.

    Paths are those of modules in the network; `targets` and the values of `choices` are their beginnings.
    """

    targets: tuple[str, ...]  # "double_blocks."
    # (argument, kinds of modules whose rank it is), in order: the first given one that fits counts
    types: tuple[tuple[str, tuple[Words, ...]], ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # train_blocks -> targets
    indices: Mapping[str, str] = field(default_factory=dict)  # argument -> list of blocks
    outside: str = ""  # argument: the ranks of modules that are in no block, for `outside_paths` in order
    outside_paths: tuple[str, ...] = ()
    # endings of paths of fused layers -> how many parts, see `fused_heights`
    fused: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)  # argument -> the encoder it switches on

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the names of all arguments that the family's module has of its own."""
        return (
            *(argument for argument, _ in self.types),
            *(("train_blocks",) if self.choices else ()),
            *self.indices,
            *((self.outside,) if self.outside else ()),
            *(("split_qkv",) if self.fused else ()),
            *self.encoders,
        )

    def types_of(self, path: str) -> list[str]:
        """Return the arguments that may hold the rank of a module; the first given one counts."""
        return [
            argument
            for argument, kinds in self.types
            if any(all(word in path for word in words) for words in kinds)
        ]

    def heights(self, path: str, rows: int, columns: int) -> tuple[int, ...]:
        """Return the rows of each part of a fused layer, () for other layers.

        rows, columns: of the layer's weight.
        """
        name = path.replace(".", "_")
        parts = next(
            (count for ending, count in self.fused.items() if name.endswith(ending.replace(".", "_"))), 0
        )
        return fused_heights(parts, rows, columns)


@dataclass(frozen=True)
class BlockNumbers:
    """Blocks of one list: the numbers of `0,1,8-12`, or all."""

    numbers: frozenset[int] | None  # None: all

    def check(self, argument: str, depth: int) -> None:
        """Raise OptionError if there is no such block among `depth` of them."""
        beyond = sorted(number for number in self.numbers or () if number >= depth)
        if beyond:
            raise OptionError(
                f"--network_args {argument}: there is no block {beyond[0]}; the model has {depth} such "
                f"blocks, 0 to {depth - 1}"
            )

    def has(self, number: int) -> bool:
        return self.numbers is None or number in self.numbers


def read_block_numbers(argument: str, text: str) -> BlockNumbers:
    """Read `all`, `none` or a list such as `0,1,8-12`. Raises OptionError for anything else."""
    if text.strip() in ("all", "none"):
        return BlockNumbers(None if text.strip() == "all" else frozenset())
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise OptionError(
                f"--network_args {argument}={text}: write all, none, or numbers of blocks such as 0,1,8-12"
            )
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return BlockNumbers(frozenset(numbers))


def read_ranks(argument: str, text: str, paths: Sequence[str]) -> tuple[int, ...]:
    """Read one rank for each of `paths` from `[4,2,0]`; 0 leaves a module out. Raises OptionError if it is
    none.
    """
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(parts) != len(paths) or not all(part.isdecimal() for part in parts):
        raise OptionError(
            f"--network_args {argument}={text}: write {len(paths)} ranks, for {', '.join(paths)}, such as "
            f"[{','.join(['4'] * len(paths))}]; 0 leaves one out"
        )
    return tuple(map(int, parts))
