"""The contract of a run mode (`WayToRun`): a way to run a transformer on several processes.

A mode is one light file, and its line in `runtime/ways/__init__.py`. The code that changes a network is in
`runtime/offload/`. Training and generation do not know individual modes: each active mode adds its
contributions to a `RunModes`, which they read.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from modules.options import Options

if TYPE_CHECKING:  # --help must not import torch
    import torch
    from torch import nn

    from protocols.loading import BlockSharder
    from protocols.steps import RunPasses
    from runtime.offload.context import ProcessGrid


class SwapsBlocks(Protocol):
    """The block-swap options that run modes read."""

    @property
    def used_flag(self) -> str:
        """The option in use, as the user types it."""


class SpeedOptions(Protocol):
    """The memory and speed options that run modes (such as --context_parallel) read."""

    @property
    def ways(self) -> Options:
        """Options of each run mode, in a field with the mode's name."""

    @property
    def swap(self) -> SwapsBlocks:
        """Options that keep blocks in host memory."""

    @property
    def modes(self) -> "RunModes":
        """What the active run modes contribute to a run."""


class FurtherModel(NamedTuple):
    """A frozen transformer that a run loads besides the one it trains or generates with."""

    name: str  # completes "... would not be split"
    option: str  # option that names its file


@dataclass(frozen=True)
class RunUses:
    """What a run uses that may conflict with its run modes; text fields name the option, "" if it is off."""

    turn_taking_options: tuple[str, ...] = ()  # options by which two transformers take turns on a device
    # in training runs: the option that names a separate model for samples
    separate_sample_model: str = ""
    foreign_module: str = ""  # network module of another package
    own_modules: Collection[str] = ()  # network modules that can replace it
    further_models: tuple[FurtherModel, ...] = ()
    # in generation
    has_step_cache: bool = False
    calibrates: bool = False  # whether a step cache is calibrated
    rewrites_prompts: bool = False


@dataclass(frozen=True)
class Division:
    """How a step is divided over processes, each with a GPU.

    An option with the metadata `division` sets the field of that name.
    """

    processes: int
    shards_weights: bool = False  # whether the weights of the blocks are split
    num_context_parallel: int = 1  # number of GPUs that share the tokens of a clip


class WayOptions(Options):
    """Base of the options of a run mode.

    Attributes:
        in_training: Whether training runs have the options too.
        keeps_pixels: Whether generated pixels stay bit-identical with the mode.
        shares: Word for what the processes share, such as "tokens".
        accelerate_advice: The option to use instead, and its effect, for users who ask accelerate's launcher
            to split the model.
        accelerate_features: Features of accelerate's launcher that the option replaces: the environment
            variable that requests the feature -> its name.
    """

    in_training: ClassVar[bool]
    keeps_pixels: ClassVar[bool]
    shares: ClassVar[str]
    accelerate_advice: ClassVar[str]
    accelerate_features: ClassVar[Mapping[str, str]]

    def __init_subclass__(
        cls,
        in_training: bool = True,
        keeps_pixels: bool = False,
        shares: str = "",
        accelerate_advice: str = "",
        accelerate_features: Mapping[str, str] | None = None,
    ) -> None:
        super().__init_subclass__()
        cls.in_training, cls.keeps_pixels, cls.shares = in_training, keeps_pixels, shares
        cls.accelerate_advice, cls.accelerate_features = accelerate_advice, accelerate_features or {}


@dataclass(frozen=True)
class ModeHooks:
    """Functions that the active run modes add to a run, by the point at which the run calls them."""

    # check full training: takes --mixed_precision, raises OptionError
    check_full_training: list[Callable[[str], None]] = field(default_factory=list)
    # takes the run, raises OptionError
    check_uses: list[Callable[[RunUses], None]] = field(default_factory=list)
    # takes the number of processes, how often they would repeat each prompt, and the run; raises OptionError
    check_launch: list[Callable[[int, int, RunUses], None]] = field(default_factory=list)
    # takes the device; returns what splits blocks as they are loaded, None if this process has all blocks
    make_block_sharder: "list[Callable[[torch.device], BlockSharder | None]]" = field(default_factory=list)
    # takes a network, the grid of processes and the device; changes the network after all other changes
    finish_network: "list[Callable[[nn.Module, ProcessGrid, torch.device], None]]" = field(
        default_factory=list
    )
    # takes the grid of processes, whether weights are split, and the device; returns what runs a step's
    # passes
    make_pass_runner: "list[Callable[[ProcessGrid, bool, torch.device], RunPasses]]" = field(
        default_factory=list
    )


@dataclass
class RunModes:
    """What the active run modes contribute to a run; options in it are spelled as a user types them."""

    speed: SpeedOptions
    flags: list[str] = field(default_factory=list)  # options of all active modes
    # option that splits each block over processes: all run the same passes at the same time, and swap no
    # block
    splits_weights: str = ""
    divides_tokens: str = ""  # option by which each process has some of the tokens of a clip; "" if off
    divides_passes: str = ""  # option by which the remaining processes share the passes of a step; "" if off
    # option -> number of processes that share a micro-batch, or a pass of a step
    process_counts_by_option: dict[str, int] = field(default_factory=dict)
    # option -> what a single process does with it
    single_process_effects: dict[str, str] = field(default_factory=dict)
    # those that a LoRA needs in generation
    flags_for_generation: dict[str, bool] = field(default_factory=dict)
    hooks: ModeHooks = field(default_factory=ModeHooks)

    @property
    def processes_per_model(self) -> int:
        """Number of processes that compute one pass together, on the same micro-batch."""
        return prod(self.process_counts_by_option.values())


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class WayToRun:
    """A run mode: a way to run a transformer on several processes, such as splitting it, with its option."""

    name: str  # name of its option
    options: type[WayOptions]
    is_on: Callable[[Any], bool]  # takes the mode's options
    join: Callable[[RunModes, Any], None]  # takes a run and the mode's options; raises OptionError
