"""What a way to run a transformer is: one record, of which options, checks, phases and plans read their part.

A way is one light file, and its line in `running/ways/__init__.py`. What it does to a network is in
`running/offload/`. No phase names a way: what they ask all ways for is in `composing.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from modules.options import Options

if TYPE_CHECKING:  # --help does without torch
    import torch
    from torch import nn

    from contract.loading import BlockPlace
    from contract.steps import RunPasses
    from running.offload.context import ProcessGrid


class SwapsBlocks(Protocol):
    """Options that keep blocks in host memory, as far as ways read them."""

    @property
    def typed(self) -> str: ...


class SpeedOptions(Protocol):
    """Options of memory and speed, as far as ways read them."""

    @property
    def ways(self) -> Options: ...  # a record for each way, by its name

    @property
    def swap(self) -> SwapsBlocks: ...


class FurtherModel(NamedTuple):
    """A frozen transformer that a run loads besides its own."""

    name: str  # completes "... would not be split"
    option: str  # that gives its file, as it is typed


@dataclass(frozen=True)
class RunUses:
    """What a run does that ways may not go with: options as they are typed, "" for what it does not do."""

    takes_turns: tuple[str, ...] = ()  # options by which two transformers take turns on a device
    # of a training: the option of the model that makes samples, and a module of a network
    samples_apart: str = ""
    foreign_module: str = ""  # of another package
    own_modules: tuple[str, ...] = ()  # that can take its place
    further_models: tuple[FurtherModel, ...] = ()
    # of a generation
    has_step_cache: bool = False
    calibrates: bool = False  # a step cache
    rewrites_prompts: bool = False


@dataclass(frozen=True)
class Division:
    """Division of a step among processes, each with a card."""

    processes: int
    shards: bool = False  # the weights of the blocks
    context: int = 1  # cards that share the tokens of a clip


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class WayToRun:
    """A way to run a transformer. The fields after `typed` may be left out."""

    name: str  # of its option
    options: type[Options]  # declared in its file; parser and --help are composed of the list
    typed: Callable[[Any], str]  # given its options: as they are typed; "": it is off
    in_training: bool = True  # trainings have it too
    keeps_pixels: bool = False  # a generation makes the same pixels with it, to the bit
    of_blocks: bool = False  # it acts on the blocks of a transformer: models without such blocks refuse it
    # each process has a part of every block: all run the same passes at the same time, and swap no block
    splits_weights: bool = False
    divides_tokens: bool = False  # each process has some of the tokens of a clip
    divides_passes: bool = False  # the processes that are left over share the passes of a step
    peers: Callable[[Any], int] | None = None  # given its options: processes that share a micro-batch or clip
    alone: str = ""  # what a single process does with it, for a warning of trainings
    # of accelerate's launcher: variables that ask for another way to split -> what that is called
    replaces: Mapping[str, str] = field(default_factory=dict)
    answer: str = ""  # to these: its option, and what it does
    shares: str = ""  # what processes share by it, in a word
    # the next four raise OptionError for what it does not go with, and are asked only if it is on
    refuse: Callable[[SpeedOptions], None] | None = None  # other options of memory and speed
    refuse_whole: Callable[[str], None] | None = None  # given --mixed_precision of a whole model that learns
    check: Callable[[RunUses, str], None] | None = None  # given the run, and the option that splits weights
    # given its options, the number of processes, how often they would make each prompt, and the run
    check_launch: Callable[[Any, int, int, RunUses], None] | None = None
    for_generation: bool = False  # a LoRA needs it in generation as well, in as many processes
    # given a division of a step among cards: the value of its option
    in_division: Callable[[Division], Any] | None = None
    # given the device: where blocks are put while loading; None: this process has them alone
    make_place: "Callable[[torch.device], BlockPlace | None] | None" = None
    # given a network, the places of all processes and the device: acts on the network after all other changes
    finish: "Callable[[nn.Module, ProcessGrid, torch.device], None] | None" = None
    # given the places of all processes, whether weights are split, and the device: runs the passes of a step
    make_passes: "Callable[[ProcessGrid, bool, torch.device], RunPasses] | None" = None
