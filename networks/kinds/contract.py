"""What a kind of network is: one record, of which each tool for networks and each phase of a training reads
its part.

A kind is one light file, or one with a heavy half next to it, and its lines in `networks/kinds/__init__.py`.
Without these every script does all the rest as before. No tool names a kind but LoRA: what is asked of all
kinds is in `composing.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:  # --help does without torch
    from pathlib import Path

    from torch import Tensor, nn

    from networks.kinds.algebra import Algebra
    from networks.names.layouts import FamilyNames

LoraModule: TypeAlias = "nn.Linear | nn.Conv2d"
Factors = Mapping[str, "Tensor"]  # "lora_down.weight" -> tensor: the factors of one module
Shapes = Mapping[str, tuple[int, ...]]  # of factors, by part
# parts of a plain LoRA, which all tools know
DOWN, UP = "lora_down.weight", "lora_up.weight"
MID, BIAS = "lora_mid.weight", "lora_up.bias"
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
    heights: tuple[int, ...]  # of parts that get factors of their own
    rate_factor: float = 1.0  # on its learning rate


class TranslatedModules(NamedTuple):
    """A LoRA in another dialect, and the modules that have no form there, each with the reason."""

    tensors: "dict[str, Tensor]"
    left_out: dict[str, str]


class Settings(Protocol):
    """The settings of a network, as far as kinds read them: see `networks.lora_settings`."""

    @property
    def rank(self) -> int: ...

    @property
    def conv_rank(self) -> int | None: ...

    @property
    def variants(self) -> Sequence["NetworkKind"]: ...

    @property
    def has_rank_dropout(self) -> bool: ...

    @property
    def ranks_by_pattern(self) -> Sequence[int]: ...

    def heights_of(self, path: str, module: LoraModule) -> tuple[int, ...]: ...


class RankRule(Protocol):
    """How many ranks of a LoRA act on a sample, by its level of noise. It can be compared and hashed."""

    @property
    def kind(self) -> "NetworkKind": ...

    def in_words(self) -> str: ...  # as --network_args has it

    # numbers of active ranks, S. levels: S, shares of noise, 0 to 1
    def active(self, rank: int, levels: "Tensor") -> "Tensor": ...


@dataclass(frozen=True, eq=False, repr=False)  # compared as objects, never printed
class NetworkKind:
    """A kind of network. All but the name may be left out."""

    name: str  # as in messages
    article: str = "a"

    # --- tensors
    parts: tuple[str, ...] = ()  # ends of their names, which no other kind has
    marks: tuple[str, ...] = ()  # each of its modules has one of these parts
    pairs: tuple[tuple[str, str], ...] = ()  # parts that need each other
    rank_parts: tuple[str, ...] = ()  # parts with the rank as first axis; the first that there is counts
    magnitudes: str = ""  # its part that `Algebra.magnitudes` is about. One kind has such a part
    cores: tuple[str, ...] = ()  # parts of its tensor form, which no training here has
    # returns how it computes with the factors of a module
    load_algebra: "Callable[[], Algebra] | None" = None
    needs_weight: bool = False  # its change depends on the weight

    # --- files: recognise and read
    starts: Mapping[str, str] = field(default_factory=dict)  # of names in files -> dialect
    word: str = ""  # in names of its tensors in any program's files: a regular expression
    ends: Mapping[str, str] = field(default_factory=dict)  # ends of other programs' names -> our parts
    flat: str = ""  # in names in files whose tensor is to become a column: a regular expression
    # given tensors and metadata of a file of ComfyUI: whether it is of the form `FROZEN_NORMS`, unmarked
    is_of_frozen_norms: Callable[[Mapping[str, Any], Mapping[str, str]], bool] | None = None
    # brings magnitudes into the form of a target: see `dora_files.with_norms`
    bring_norms: Callable[[Any, Any, Any, bool, str], Any] | None = None
    # further spellings in names in files: a regular expression -> what takes its place
    spellings: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # other forms, by ends of names
    read_form: str = ""  # the form that is read, if there are others
    check_file: "Callable[[Path], None] | None" = (
        None  # raises CheckpointError for what is to be read otherwise
    )

    # --- networks that are trained
    network_module: str = ""  # of ours; "": it is trained by no module of its own
    module_note: str = ""  # behind the module's name in --help
    dropout_note: str = ""  # what --network_dropout is, in --help
    size_word: str = "rank"  # what --network_dim is
    default_size: int | None = None
    size_of: "Callable[[Factors], int | None] | None" = None  # what --network_dim was, if it is no rank
    is_sized_by_rank: bool = False  # its files grow with --network_dim
    has_alpha: bool = True
    has_norms: bool = True  # of changes, for --scale_weight_norms
    is_for_texts: bool = True
    is_for_convolutions: bool = True
    other_modules: Mapping[str, str] = field(default_factory=dict)  # not built here -> what to use instead
    algorithms: tuple[str, ...] = ()  # `algo` of LyCORIS for the same network
    # orders of a layer's parameters in states of optimizers, here and in other programs
    orders: tuple[tuple[str, ...], ...] = ()
    # of a kind that arguments of a LoRA ask for: the switch, and numbers by type (whole ones from 1 on)
    switch: str = ""
    numbers: Mapping[str, type[int] | type[float]] = field(default_factory=dict)
    extend_layer: "Callable[[Any], None] | None" = None  # changes the layer of a LoRA
    is_with_file: bool = False  # whether these act with --dim_from_weights
    # given the values of arguments and the rank; given metadata of a file and its path: which ranks act,
    # None: all. Raise OptionError and CheckpointError
    rule_of_arguments: "Callable[[Mapping[str, Any], int], RankRule | None] | None" = None
    rule_of_file: "Callable[[Mapping[str, str], Path | None], RankRule | None] | None" = None
    merged: str = ""  # what merging loses, as a sentence behind the file's path
    # takes its own arguments out of --network_args, and returns what `make_layers` needs of them
    read_arguments: Callable[[dict[str, Any]], Any] | None = None
    # given the settings, and whether some are of `FOR_LORAS`: raises OptionError
    check_settings: "Callable[[Settings, bool], None] | None" = None
    # given the modules, the settings and what `read_arguments` returned: the layers
    make_layers: "Callable[[Mapping[str, Target], Settings, Any], dict[str, nn.Module]] | None" = None
    # given a module, its path, its factors in a file and the settings: its layer. Raises CheckpointError
    layer_of: "Callable[[LoraModule, str, Factors, Settings], nn.Module] | None" = None

    # --- other programs
    # why files of a format cannot hold it, given the format's name, the family and whether text encoders
    # learn; "": they can
    fault_of_format: "Callable[[str, FamilyNames | None, bool], str] | None" = None
    not_in_comfyui: str = ""  # why a module has no form there
    refusal_by_comfyui: str = ""  # of a whole file: the message behind its path
    # given modules under our names and their family: how diffusers reads a file of this kind alone, else None
    write_for_diffusers: "Callable[[Mapping[str, Factors], FamilyNames], TranslatedModules | None] | None" = (
        None
    )
    no_two_experts: str = ""  # why a file in diffusers' dialect cannot hold those of two experts
    is_for_comfyui_alone: bool = False  # which reads its files as they are
    elsewhere: str = ""  # what other programs do with its files
    plain_title: str = ""  # of the command that makes plain LoRAs, if other programs need these


def named(kind: NetworkKind) -> str:
    return f"{kind.article} {kind.name}"
