"""The class that describes a network kind (LoRA, LoKr, DoRA, ...) to tools and training.

A kind has one file that does not import torch, other files that do, one in `networks/train/` if it has layers
of its own, and two lines in `__init__.py` of both folders. If all of them are removed, everything else still
works: no tool names a kind except LoRA. Functions over all kinds are in `composing.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from modules.errors import OptionError
from networks.kinds.factors import Factors

if TYPE_CHECKING:  # --help must not import torch
    from pathlib import Path

    from torch import Tensor, nn

    from networks.kinds.algebra import Algebra

LoraModule: TypeAlias = "nn.Linear | nn.Conv2d"
# arguments of --network_args that other kinds do not have, as messages list them
LORA_ONLY_ARGUMENTS = ("dora_wd", "loraplus_...", "network_reg_lrs", "ggpo_...", "tlora")


class Target(NamedTuple):
    """A module of the model that gets a trainable adapter layer."""

    module: LoraModule
    rank: int
    alpha: float
    split_sizes: tuple[int, ...] = ()  # rows of parts that get separate factors; (): one pair of factors
    rate_factor: float = 1.0  # multiplies the learning rate


class Settings(Protocol):
    """Network settings that kinds (LoRA, LoHa, ...) read; `networks.lora_settings` implements them."""

    @property
    def rank(self) -> int:
        """Rank of linear layers."""

    @property
    def conv_rank(self) -> int | None:
        """Rank of convolutions with kernels larger than 1 x 1; None if they get no LoRA."""

    @property
    def variants(self) -> Sequence["NetworkKind"]:
        """Network kinds that extend the layers, such as DoRA."""

    @property
    def dropouts(self) -> object:
        """Dropout probabilities; None without dropout."""

    @property
    def has_rank_dropout(self) -> bool:
        """Whether rank dropout is used."""

    @property
    def ranks_by_pattern(self) -> Sequence[int]:
        """Ranks that regular expressions in --network_args assign to modules."""

    def split_sizes_of(self, path: str, module: LoraModule) -> tuple[int, ...]:
        """Return the row count of each part if a fused layer gets separate factors per part; otherwise ()."""


class RankRule(Protocol):
    """Number of active ranks of a LoRA as a function of the noise level; can be compared and hashed."""

    @property
    def kind(self) -> "NetworkKind":
        """The network kind whose LoRAs use this rule (T-LoRA)."""

    def in_words(self) -> str:
        """Return the rule as it is written in --network_args."""

    def explain_merging(self, path: "Path") -> str:
        """Return a warning that says what is lost if the file of a LoRA with this rule is merged."""

    def active(self, rank: int, levels: "Tensor") -> "Tensor":
        """Return the number of active ranks for each sample, S.

        Args:
            rank: Rank of the LoRA.
            levels: Noise level of each sample, S, from 0 to 1.
        """


def measure_nothing(factors: Factors) -> None:
    """Return None: modules with a rank have no other size."""


@dataclass(frozen=True)
class NetworkSize:
    """What --network_dim means for a network kind: a rank, unless the kind says otherwise."""

    word: str = "rank"
    default: int = 4
    note: str = ""  # for --help
    # returns the size of a module without a rank; None if it has no such size
    measure: Callable[[Factors], int | None] = measure_nothing


class NetworkKind:
    """Properties and functions of a kind of adapter, such as LoKr; defaults fit LoRA or disable a feature."""

    name: str  # for messages

    # --- tensors
    parts: tuple[str, ...] = ()  # factor names (endings of tensor names) that only this kind has
    marks: tuple[str, ...] = ()  # subset of `parts`; each of its modules has at least one of them
    pairs: tuple[tuple[str, str], ...] = ()  # factors that are only valid together
    rank_parts: tuple[str, ...] = ()  # parts whose first axis is the rank; the first that exists is used
    magnitudes = ""  # part for `Algebra.magnitudes`; only one kind has it
    cores: tuple[str, ...] = ()  # parts of its Tucker form, which is read but not trained
    needs_weight = False  # whether its change depends on the frozen weight
    # whether it rotates the inputs of linear layers of the transformer: it has no alpha and no norm, and text
    # encoders and convolutions get no layers
    rotates = False

    # --- training
    network_module = ""  # value of --network_module; "": it extends the layers of a LoRA
    dropout_note = ""  # meaning of --network_dropout, for --help
    size = NetworkSize()  # what --network_dim means
    is_sized_by_rank = False  # whether its files grow with --network_dim
    # orders of a layer's parameters in optimizer states, here and in other programs
    orders: tuple[tuple[str, ...], ...] = ()
    # for a kind that a LoRA's --network_args enable: the argument that enables it, and the types of its other
    # arguments (integers are at least 1)
    switch = ""
    numbers: Mapping[str, type[int] | type[float]] = MappingProxyType({})
    is_with_file = False  # whether these arguments are used with --dim_from_weights

    @property
    def word(self) -> str:
        """The word with which the names of its factors begin, in files of any program; "" without factors."""
        return self.parts[0].partition("_")[0] if self.parts else ""

    def load_algebra(self) -> "Algebra | None":
        """Return the object that computes with a module's factors; None if the kind has no factors."""
        return None

    def load_training(self) -> "KindTraining | None":
        """Return the object that builds the trained layers of an extension's kind; None if it has none.

        The layers of the kinds in this folder are in `networks/train`, which knows the kinds.
        """
        return None

    def read_rule_of_arguments(self, values: Mapping[str, Any], rank: int) -> "RankRule | None":
        """Return the rule for active ranks from the values of --network_args; None if all ranks are active.

        Raises:
            OptionError: If a value is out of range.
        """
        return None

    def read_rule_of_file(self, metadata: Mapping[str, str], path: "Path | None") -> "RankRule | None":
        """Return the rule for active ranks from a file's metadata; None if all ranks are active.

        Raises:
            CheckpointError: If a value of the rule cannot be read.
        """
        return None


class KindTraining:
    """Builds the trained layers of a network kind, or extends those of a LoRA, as DoRA does."""

    kind: NetworkKind

    def read_arguments(self, arguments: dict[str, Any]) -> Any:
        """Remove this kind's own arguments from --network_args; return their values for `make_layers`.

        Raises:
            OptionError: If a value is out of range.
        """
        return None

    def check_settings(self, settings: Settings, has_lora_arguments: bool) -> None:
        """Check the settings of a network of this kind.

        Args:
            settings: All settings.
            has_lora_arguments: Whether any argument in `LORA_ONLY_ARGUMENTS` is set.

        Raises:
            OptionError: If the kind does not support one of the settings.
        """
        if has_lora_arguments or settings.dropouts is not None:
            *first, last = LORA_ONLY_ARGUMENTS
            raise OptionError(
                f"--network_dropout, and rank_dropout, module_dropout, {', '.join(first)} and {last} of "
                "--network_args, are for LoRAs only: omit them, or use --network_module networks.lora"
            )

    def make_layers(
        self, targets: Mapping[str, Target], settings: Settings, kind_arguments: Any
    ) -> "dict[str, nn.Module]":
        """Return a trainable layer for each target module.

        Args:
            targets: Modules that get a layer, by name.
            settings: Settings of the network.
            kind_arguments: Result of `read_arguments`.
        """
        raise AssertionError(f"{self.kind.name} has no layers of its own")

    def make_layer(self, module: LoraModule, path: str, factors: Factors, settings: Settings) -> "nn.Module":
        """Return a trainable layer for a module, with factors of the same shapes as in a file.

        Raises:
            CheckpointError: If the factors do not fit the module, or cannot be trained.
        """
        raise AssertionError(f"{self.kind.name} has no layers of its own")

    def extend_layer(self, layer: Any) -> None:
        """Add this kind's parameters to a LoRA layer, as --network_args or the factors of a file require."""


def named(kind: NetworkKind) -> str:
    """Return a network kind's name with its article for messages, such as "an OFT"."""
    return f"{'an' if kind.name[0] in 'AEIO' else 'a'} {kind.name}"
