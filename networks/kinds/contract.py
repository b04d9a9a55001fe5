"""Describe a kind of network in one record, from which each tool and each phase of a training reads its part.

A kind is one light file, or one with a heavy half next to it, and its lines in `networks/kinds/__init__.py`.
Without these, every script does everything else as before. No tool names a kind except LoRA: questions to all
kinds are in `composing.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from modules.errors import OptionError
from networks.kinds.factors import Factors

if TYPE_CHECKING:  # --help does without torch
    from pathlib import Path

    from torch import Tensor, nn

    from networks.kinds.algebra import Algebra
    from networks.names.layouts import FamilyNames

LoraModule: TypeAlias = "nn.Linear | nn.Conv2d"
# metadata: the norms that magnitudes by output refer to; with this value those of the frozen weights, as in
# ComfyUI, otherwise those of the changed weights. A public name: other tools write it too.
NORMS_FORM, FROZEN_NORMS = "ss_dora_scale_format", "comfy_weight_norm"
# arguments of --network_args that other kinds do not have, as messages list them
FOR_LORAS = ("dora_wd", "loraplus_...", "network_reg_lrs", "ggpo_...", "tlora")


class Target(NamedTuple):
    """A module that gets a layer of a network."""

    module: LoraModule
    rank: int
    alpha: float
    split_sizes: tuple[int, ...]  # of parts that get factors of their own
    rate_factor: float = 1.0  # on its learning rate


class TranslatedModules(NamedTuple):
    """A LoRA in another dialect, and the modules that the dialect cannot express, each with the reason."""

    tensors: "dict[str, Tensor]"
    left_out: dict[str, str]


class Settings(Protocol):
    """The settings of a network, as far as kinds read them: see `networks.lora_settings`."""

    @property
    def rank(self) -> int:
        """Rank of linear layers."""

    @property
    def conv_rank(self) -> int | None:
        """Rank of convolutions with a kernel; None if they get no LoRA."""

    @property
    def variants(self) -> Sequence["NetworkKind"]:
        """Kinds that extend the layers, such as DoRA."""

    @property
    def dropouts(self) -> object:
        """The dropouts; None if there are none."""

    @property
    def has_rank_dropout(self) -> bool:
        """Whether whole ranks are dropped."""

    @property
    def ranks_by_pattern(self) -> Sequence[int]:
        """Ranks that patterns of --network_args give to modules."""

    def split_sizes_of(self, path: str, module: LoraModule) -> tuple[int, ...]:
        """Return the rows of each part if a fused layer gets separate factors for its parts; () otherwise."""


class RankRule(Protocol):
    """How many ranks of a LoRA act on a sample, by its level of noise. It can be compared and hashed."""

    @property
    def kind(self) -> "NetworkKind":
        """The kind that the rule belongs to."""

    def in_words(self) -> str:
        """Return the rule as --network_args has it."""

    def active(self, rank: int, levels: "Tensor") -> "Tensor":
        """Return the number of active ranks for each sample, S.

        Args:
            rank: Rank of the LoRA.
            levels: Noise level of each sample, S, from 0 to 1.
        """


class NetworkKind:
    """A kind of network. Whatever a kind does not define is as for a plain LoRA, or does not exist."""

    name: str  # as in messages
    article = "a"

    # --- tensors
    parts: tuple[str, ...] = ()  # ends of their names, which no other kind has
    marks: tuple[str, ...] = ()  # each of its modules has one of these parts
    pairs: tuple[tuple[str, str], ...] = ()  # parts that need each other
    rank_parts: tuple[str, ...] = ()  # parts with the rank as first axis; the first that there is counts
    magnitudes = ""  # its part that `Algebra.magnitudes` is about. One kind has such a part
    cores: tuple[str, ...] = ()  # parts of its tensor form, which no training here has
    # raises CheckpointError if a file with its modules was written for a variant that cannot be read
    check_file: Callable[["Path"], None] | None = None
    needs_weight = False  # its change depends on the weight

    # --- names in files
    starts: Mapping[str, str] = MappingProxyType({})  # of names -> dialect
    word = ""  # in names of its tensors in any program's files: a regular expression
    ends: Mapping[str, str] = MappingProxyType({})  # ends of other programs' names -> our parts
    flat = ""  # in names whose tensor is to become a column: a regular expression
    spellings: Mapping[str, str] = MappingProxyType({})  # a regular expression -> what takes its place
    unread: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # other forms, by ends of names
    read_form = ""  # the form that is read, if there are others

    # --- networks that are trained
    network_module = ""  # of ours; "": it is trained by no module of its own
    module_note = ""  # behind the module's name in --help
    dropout_note = ""  # what --network_dropout is, in --help
    size_word = "rank"  # what --network_dim is
    default_size: int | None = None
    is_sized_by_rank = False  # its files grow with --network_dim
    has_alpha = True
    takes_all_settings = False  # else `check_settings` says which it does not support
    has_norms = True  # of changes, for --scale_weight_norms
    is_for_texts = True
    is_for_convolutions = True
    other_modules: Mapping[str, str] = MappingProxyType({})  # not built here -> what to use instead
    algorithms: tuple[str, ...] = ()  # `algo` of LyCORIS for the same network
    # orders of a layer's parameters in states of optimizers, here and in other programs
    orders: tuple[tuple[str, ...], ...] = ()
    # of a kind that arguments of a LoRA ask for: the switch, and numbers by type (integers from 1 on)
    switch = ""
    numbers: Mapping[str, type[int] | type[float]] = MappingProxyType({})
    is_with_file = False  # whether these act with --dim_from_weights
    merged = ""  # what merging loses, as a sentence behind the file's path

    # --- other programs
    not_in_comfyui = ""  # why a module has no form there
    rejection_by_comfyui = ""  # of a file: the message behind its path
    no_two_experts = ""  # why a file in diffusers' dialect cannot hold those of two experts
    is_for_comfyui_alone = False  # which reads its files as they are
    elsewhere = ""  # what other programs do with its files
    plain_title = ""  # of the command that makes plain LoRAs, if other programs need these

    def load_algebra(self) -> "Algebra | None":
        """Return the computations with a module's factors; None if the kind has no factors of its own."""
        return None

    def has_frozen_norms(self, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
        """Return whether a file of ComfyUI is of the form `FROZEN_NORMS` without saying so."""
        return False

    def bring_norms(
        self, lora: Any, family: "FamilyNames | None", baking: Any, are_frozen: bool, target: str
    ) -> Any:
        """Return a LoRA file whose magnitudes refer to the norms that the target dialect uses."""
        return lora

    def size_of(self, factors: Factors) -> int | None:
        """Return what --network_dim was for these factors, if it is no rank."""
        return None

    def read_arguments(self, arguments: dict[str, Any]) -> Any:
        """Take its own arguments out of --network_args and return what `make_layers` needs of them.

        Raises:
            OptionError: If one is out of range.
        """
        return None

    def check_settings(self, settings: "Settings", of_loras: bool) -> None:
        """Check the settings of a network of this kind.

        Args:
            settings: All settings.
            of_loras: Whether some of the settings in `FOR_LORAS` are given.

        Raises:
            OptionError: If the kind does not support one of the settings.
        """
        if of_loras or settings.dropouts is not None:
            *first, last = FOR_LORAS
            raise OptionError(
                f"--network_dropout, and rank_dropout, module_dropout, {', '.join(first)} and {last} of "
                "--network_args, are for LoRAs only: leave them out, or use --network_module networks.lora"
            )

    def make_layers(
        self, targets: "Mapping[str, Target]", settings: "Settings", own: Any
    ) -> "dict[str, nn.Module]":
        """Return the layers of a network.

        Args:
            targets: Modules that get a layer, by name.
            settings: Settings of the network.
            own: What `read_arguments` returned.
        """
        raise AssertionError(f"{self.name} has no layers of its own")

    def layer_of(self, module: LoraModule, path: str, factors: Factors, settings: "Settings") -> "nn.Module":
        """Return the layer of a module with the sizes of a file's factors.

        Raises:
            CheckpointError: If the factors are not for the module, or cannot be trained here.
        """
        raise AssertionError(f"{self.name} has no layers of its own")

    def extend_layer(self, layer: Any) -> None:
        """Change the layer of a LoRA whose arguments or factors ask for this kind."""

    def read_rule_of_arguments(self, values: Mapping[str, Any], rank: int) -> "RankRule | None":
        """Return which ranks act, by the values of --network_args; None: all.

        Raises:
            OptionError: If a value is out of range.
        """
        return None

    def read_rule_of_file(self, metadata: Mapping[str, str], path: "Path | None") -> "RankRule | None":
        """Return the rule in a file's metadata by which only some ranks are used at a time; None if all are.

        Raises:
            CheckpointError: If its values cannot be read.
        """
        return None

    def find_format_error(self, name: str, family: "FamilyNames | None", has_texts: bool) -> str:
        """Return why files of a format cannot hold the kind; "" if they can.

        Args:
            name: Format of --lora_format.
            family: Names of the model's modules.
            has_texts: Whether text encoders learn too.
        """
        return ""

    def write_for_diffusers(
        self, modules: Mapping[str, Factors], family: "FamilyNames"
    ) -> "TranslatedModules | None":
        """Return modules of this kind in the form that diffusers reads; None if there is no such form."""
        return None


def named(kind: NetworkKind) -> str:
    """Return the name of a kind with its article, for messages."""
    return f"{kind.article} {kind.name}"
