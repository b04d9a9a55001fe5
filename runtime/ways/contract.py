"""What a way to run a transformer is.

A way is one light file, and its line in `runtime/ways/__init__.py`. What it does to a network is in
`runtime/offload/`. No phase names a way, or asks one: a way that is on joins the run (`JoinedWays`) and
writes into it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from modules.options import Options

if TYPE_CHECKING:  # --help needs no torch
    import torch
    from torch import nn

    from protocols.loading import BlockPlace
    from protocols.steps import RunPasses
    from runtime.offload.context import ProcessGrid


class SwapsBlocks(Protocol):
    """The part of the block-swap options that modes of running use."""

    @property
    def typed(self) -> str:
        """The option in use, as the user types it."""


class SpeedOptions(Protocol):
    """The part of the memory and speed options that modes of running use."""

    @property
    def ways(self) -> Options:
        """Options of each mode, by its name."""

    @property
    def swap(self) -> SwapsBlocks:
        """Options that keep blocks in host memory."""

    @property
    def joined(self) -> "JoinedWays":
        """The contributions of the active modes."""


class FurtherModel(NamedTuple):
    """A frozen transformer that a run loads in addition to its own."""

    name: str  # completes "... would not be split"
    option: str  # that gives its file, as it is typed


@dataclass(frozen=True)
class RunUses:
    """Uses of a run that modes of running may conflict with: the option of each use, or "" if it is off."""

    takes_turns: tuple[str, ...] = ()  # options by which two transformers take turns on a device
    # of a training: the option of the model that makes samples, and a module of a network
    samples_apart: str = ""
    foreign_module: str = ""  # of another package
    own_modules: Collection[str] = ()  # that can take its place
    further_models: tuple[FurtherModel, ...] = ()
    # of a generation
    has_step_cache: bool = False
    calibrates: bool = False  # a step cache
    rewrites_prompts: bool = False


@dataclass(frozen=True)
class Division:
    """How a step is divided over processes, each with a GPU.

    The fact `division` of an option names the field that holds its value.
    """

    processes: int
    shards: bool = False  # the weights of the blocks
    context: int = 1  # cards that share the tokens of a clip


class WayOptions(Options):
    """Base of the options of a way to run.

    Attributes:
        in_training: Whether trainings have the options too.
        keeps_pixels: Whether a generation gives bit-identical pixels.
        shares: Word for what the processes share.
        answer: The option and its effect, for users who ask accelerate's launcher to split the model.
        replaces: Name of accelerate's feature, by the environment variable that asks for it.
    """

    in_training: ClassVar[bool]
    keeps_pixels: ClassVar[bool]
    shares: ClassVar[str]
    answer: ClassVar[str]
    replaces: ClassVar[Mapping[str, str]]

    def __init_subclass__(
        cls,
        in_training: bool = True,
        keeps_pixels: bool = False,
        shares: str = "",
        answer: str = "",
        replaces: Mapping[str, str] | None = None,
    ) -> None:
        super().__init_subclass__()
        cls.in_training, cls.keeps_pixels, cls.shares = in_training, keeps_pixels, shares
        cls.answer, cls.replaces = answer, replaces or {}


@dataclass(frozen=True)
class WayHooks:
    """Functions that modes of running call at points of a run, in the order of the modes."""

    # given --mixed_precision of a whole model that learns: raises OptionError
    whole: list[Callable[[str], None]] = field(default_factory=list)
    check: list[Callable[[RunUses], None]] = field(default_factory=list)  # given the run: raises OptionError
    # given the number of processes, how often they would make each prompt, and the run: raises OptionError
    launch: list[Callable[[int, int, RunUses], None]] = field(default_factory=list)
    # given the device: where blocks are put while loading; None: this process has them alone
    place: "list[Callable[[torch.device], BlockPlace | None]]" = field(default_factory=list)
    # given a network, the places of all processes and the device: acts on it after all other changes
    finish: "list[Callable[[nn.Module, ProcessGrid, torch.device], None]]" = field(default_factory=list)
    # given the places of all processes, whether weights are split, and the device: runs the passes of a step
    passes: "list[Callable[[ProcessGrid, bool, torch.device], RunPasses]]" = field(default_factory=list)


@dataclass
class JoinedWays:
    """The contributions of the active modes to a run. Options are spelled as a user types them."""

    speed: SpeedOptions
    typed: list[str] = field(default_factory=list)  # of all these ways
    # that splits each block over processes: all run the same passes at the same time, and swap no block
    splits_weights: str = ""
    divides_tokens: str = ""  # each process has some of the tokens of a clip
    divides_passes: str = ""  # the processes that are left over share the passes of a step
    # option -> processes that share a micro-batch, or a pass of a step
    peers: dict[str, int] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)  # option -> what a single process does with it
    for_generation: dict[str, bool] = field(default_factory=dict)  # that a LoRA needs in generation as well
    on: WayHooks = field(default_factory=WayHooks)

    @property
    def num_peers(self) -> int:
        """Number of processes that work together on one model."""
        return prod(self.peers.values())


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class WayToRun:
    """A mode of running a transformer."""

    name: str  # of its option
    options: type[WayOptions]
    is_on: Callable[[Any], bool]  # given its options
    join: Callable[[JoinedWays, Any], None]  # given a run and its options, if it is on: raises OptionError
