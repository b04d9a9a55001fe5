"""Records of the module names of a family, and patterns that rename the tensors of a checkpoint.

`{n}` stands for a block number. LoRA files of our dialect write a path with "_" for "."; these lists restore
the path.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from protocols.families import HIGH_NOISE, LOW_NOISE

REST, SWAPPED, BEFORE_REST = -1, -2, -3
OURS, OF_LTX_FORK = "lora_unet_", "lora_unet_model_"  # before names in LoRA files of ours; of musubi's fork
IN_COMFYUI, IN_DIFFUSERS = "diffusion_model.", "transformer."  # before module paths in LoRA files for either
UNET_IN_DIFFUSERS = "unet."
# whose names saved LoRAs have (--lora_format): those of the known tuners, of ComfyUI, of diffusers
KNOWN, COMFYUI, DIFFUSERS = "known", "comfyui", "diffusers"
# first layers; how many channels they take differs between models of a family
FIRST_LAYERS = (
    "patch_embedding.weight",
    "img_in.proj.weight",
    "x_embedder.proj.weight",
    "conv_in.weight",  # of U-Nets, as the next; more channels for inpainting
    "input_blocks.0.0.weight",
)
TRAINED_ON = "ss_base_model_version"  # the metadata of a LoRA file that name its family
TRAINED_EXPERT = "ss_wan_expert"  # metadata of a LoRA file that name its expert, with one of these values
# metadata of a LoRA file: which of a model's uses it has learned, in words (`Family.metadata` as trained_for)
TRAINED_FOR = "reelsmith_trained_for"
# metadata of a training adapter: name and hash of the distilled transformer that it is for
MADE_FOR = "ss_training_adapter_for"
LORA_FORMAT = "ss_lora_format"  # metadata of a LoRA file: whose names it has, a value of --lora_format
# metadata of our files without alphas, JSON: rank -> alpha / rank that was folded into factors of this rank
FOLDED = "reelsmith_folded"
EXPERT_VALUES = {"high": HIGH_NOISE, "low": LOW_NOISE}
# of text encoders: how the names of their layers begin
OF_CLIP, OF_T5, OF_LANGUAGE_MODEL = "text_model_", "encoder_block_", "layers_"
FOR_BOTH = "both"  # another value: one LoRA that was trained in both


@dataclass(frozen=True)
class WeightPart:
    """A module of another layout whose weight is some or all rows of one of our weights."""

    theirs: str  # path in the other layout
    ours: str
    # None: all rows; n: the nth group of as many rows as the part has; REST: the last rows; BEFORE_REST: the
    # last but as many rows as the part has; SWAPPED: all rows, with the two halves swapped
    index: int | None = None
    default_height: int = 1  # height as a multiple of the lowest part's, in every published model


# The order in which known trainers number the modules of a LoRA, as states of their optimizers do: (start,
# endings), all blocks of the first start, one after the other, then those of the next. It is the order in
# which the trainer's network registers its layers. Source: lists of modules recorded with the trainers
# (`tests/golden`), the published model code
Numbering = tuple[tuple[str, str], ...]
Sides = tuple[tuple[str, float, float], ...]  # see `FamilyNames.sides`
# (width of a block, {list of blocks in our layout: how many it has}) of published models
Released = tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
# of blocks with two streams in diffusers' layout
IN_TWO_STREAMS: Sides = (
    *((f".to_{x}", 1, 1) for x in ("q", "k", "v", "out.0", "add_out")),
    *((f".add_{x}_proj", 1, 1) for x in "qkv"),
    (".net.0.proj", 4, 1),
    (".net.2", 1, 4),
)
# of `Numbering`, in blocks with two streams in diffusers' layout
NUMBERED_ATTENTION = (
    "attn.to_q attn.to_k attn.to_v attn.add_k_proj attn.add_v_proj attn.add_q_proj attn.to_out.0"
)


@dataclass(frozen=True)
class LoraRules:
    """Arguments of a single family that select among the modules that its `DitSpec` allows for LoRAs.

    Paths are module paths in the network; the values of `choices` are beginnings of such paths.
    """

    # (argument, kinds of modules that get this rank), in order: the first given one that matches counts
    types: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # train_blocks -> "double_blocks."
    indices: Mapping[str, str] = field(default_factory=dict)  # argument -> list of blocks
    outside: str = ""  # argument: the ranks of modules that are in no block, for `outside_paths` in order
    outside_paths: tuple[str, ...] = ()
    # endings of paths of fused layers -> how many parts, see `networks.lora_products.fused_sizes`
    fused: Mapping[str, int] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)  # argument -> the encoder it switches on
    # argument -> the part of `DitSpec.lora_exclude` that it switches on
    switches: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RowsByHead:
    """Layers whose rows one program's LoRAs have by head, [q0 k0 v0, q1 k1 v1, ...]; ours are [q; k; v]."""

    mark: str  # regular expression that finds some name in these files, and in no other program's
    ending: str  # of our paths of the layers
    norm_ending: str  # of our paths of norms that are as wide as a head, in models' files
    head_width: int  # of released models, because no LoRA shows it


@dataclass(frozen=True)
class GrownBlocks:
    """A list of blocks that is longer in deeper variants of a model, which repeat some of the blocks.

    The copies of a block follow it directly.
    """

    blocks: str  # name of the list in our layout
    also_called: tuple[str, ...]  # in other layouts
    depths: tuple[int, ...]  # number of blocks of each variant; each adds one more copy of the copied blocks
    copied: frozenset[int]  # blocks of the first variant that the others repeat
    keys: tuple[str, ...]  # metadata of a LoRA file that say for how many blocks it is, ours first
    maximum: int = 1000  # that a file may name

    def originals(self, depth: int) -> list[int]:
        """Return, for each block of a variant, the index of the block that it copies in the shortest one."""
        copies = self.depths.index(depth)
        order = []
        for block in range(self.depths[0]):
            order += [block] * (1 + copies * (block in self.copied))
        return order

    def places(self, source: int, depth: int) -> list[list[int]]:
        """Return, for each block of a variant, the indices of its copies in a deeper variant.

        If the variant itself has several copies of a block, the deeper variant's additional copies belong to
        the last of them.

        Args:
            source: Number of blocks of the variant.
            depth: Number of blocks of the deeper variant.
        """
        copies: list[list[int]] = []
        next_index = 0  # in the deeper variant
        originals = self.originals(source)
        counts = Counter(self.originals(depth))
        for index, original in enumerate(originals):
            is_last_copy = index + 1 == len(originals) or originals[index + 1] != original
            num_copies = 1
            if is_last_copy:
                num_copies += counts[original] - originals.count(original)
            copies.append([*range(next_index, next_index + num_copies)])
            next_index += num_copies
        return copies


@dataclass(frozen=True, eq=False)  # compared and hashed as objects: the lists are long
class FamilyNames:
    """Module paths of one network."""

    name: str  # as in `ss_base_model_version`
    architecture: str  # as in `modelspec.architecture`, before its "/lora"
    aliases: tuple[tuple[str, str], ...] = ()  # (path in another layout, our path)
    parts: tuple[WeightPart, ...] = ()  # of a layout that splits some of our modules
    # of a layout that stacks some of our modules: here `theirs` is our module, and `ours` the stacked one
    joined: tuple[WeightPart, ...] = ()
    # whether ComfyUI reads LoRAs under the names of that layout, of stacked modules and of `aliases`, alone
    stacked_in_comfyui: bool = False
    network_module: str = ""  # ours that trains its LoRAs, as --network_module names it
    rules: LoraRules | None = None  # of that module's own arguments
    takes: tuple[str, ...] = ()  # families whose LoRAs are of use here too
    start: str = IN_COMFYUI  # of the LoRA files that other tools read
    # tools that read LoRAs under our names only after conversion; "": all tools read them so
    converted_for: str = ""
    default_format: str = KNOWN  # of the files that a training saves, without --lora_format
    not_in_comfyui: str = ""  # why ComfyUI reads no LoRA for it; "": it does
    not_in_diffusers: tuple[tuple[str, str], ...] = ()  # (kind of networks, why diffusers does not read it)
    # starts of the names of the text encoders that diffusers' pipelines take LoRAs for
    texts_in_diffusers: tuple[str, ...] = ()
    # (start of our names for a text encoder, start of its paths in ComfyUI); others are read under our names
    texts_in_comfyui: tuple[tuple[str, str], ...] = ()
    # whether ComfyUI reads LoRAs by underscored names, those of `aliases` among them: its paths differ from
    # ours in dots too
    underscored: bool = False
    # kinds of networks besides LoRA that diffusers reads, under the names that ComfyUI reads
    kinds_in_diffusers: tuple[str, ...] = ()
    # whether our paths are those of diffusers; then `aliases` are another layout's
    is_as_in_diffusers: bool = False
    # names that every tool but diffusers gives to LoRAs for it: underscored ones, "ours" or "aliases"; ""
    # if they differ
    always_underscored: str = ""
    # parameters that are no module's weight or bias, as aliases; LoRA files write `{path}.diff` for them
    parameters: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()  # our paths, also of parameters, that only some models have
    optional_words: str = ""  # description of these, for messages
    # what others write in `ss_base_model_version`, if it is not the name; `ss_network_module` too then
    written_version: str = ""
    versions: tuple[str, ...] = ()  # how else `ss_base_model_version` may begin, in lower case
    # (regular expression of metadata that tell a LoRA that cannot be used, why): networks/loading.py
    refused: tuple[tuple[str, str], ...] = ()
    # releases whose LoRAs have the same names: a regular expression that finds one in such metadata, and the
    # newest with a parameter that only it has
    release_pattern: str = ""
    newest: tuple[str, str] = ("", "")
    # text encoders that LoRAs change: (start of their modules' names in LoRA files, how their layers' names
    # begin); of several with the same layers the first one counts as the first
    encoders: tuple[tuple[str, str], ...] = (("lora_te1", OF_CLIP), ("lora_te3", OF_T5))
    # by which families with equal names are told apart: (end of "." and our path, rows and columns of the
    # weight in widths of a block; 0: not told), and the published models. Of U-Nets it is the texts' width.
    sides: Sides = ()
    released: Released = ()
    # (what a pipeline of diffusers calls an expert's network, the expert), if there are several
    experts: tuple[tuple[str, str], ...] = ()
    more_experts: tuple[tuple[str, str], ...] = ()  # how else files that hold several call them
    further: tuple[str, ...] = ()  # our paths that no other layout has
    numbered: Numbering = ()
    # beginnings of our paths that belong to the text encoder's side of the model here, and what they are
    text_side: tuple[str, ...] = ()
    text_side_words: str = ""
    # beginnings of names in diffusers' dialect besides "transformer.", of networks with the same modules
    more_starts: tuple[str, ...] = ()
    rows_by_head: RowsByHead | None = None
    # whether a file with an underscored name of no module is refused, rather than used in part
    rejects_strangers: bool = False
    # beginnings of paths, of any layout, that files write without the prefix of the transformer
    unprefixed: tuple[str, ...] = ()
    grown: GrownBlocks | None = None  # whose LoRAs fit deeper variants too (`networks.depths`)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """All module paths of the network in our layout, each once."""
        named = (*(ours for _, ours in self.aliases), *(part.ours for part in self.parts), *self.further)
        return tuple(dict.fromkeys(named))


def with_endings(start: str, endings: str) -> tuple[str, ...]:
    """Return the paths that begin with `start` and end with one of the words of `endings`."""
    return tuple(start + ending for ending in endings.split())


def in_both_streams(endings: str) -> str:
    """Return the endings with `{x}` replaced by img, then by txt."""
    return " ".join(endings.replace("{x}", stream) for stream in ("img", "txt"))


def stacked_parts(theirs: str, ours: str) -> tuple[WeightPart, ...]:
    """Return the parts q, k and v ({x} in `theirs`) of a weight of ours that stacks them in this order."""
    return tuple(
        WeightPart(theirs.replace("{x}", character), ours, row) for row, character in enumerate("qkv")
    )


def renamed_parts(theirs: str, ours: str, endings: Iterable[tuple[str, str]]) -> tuple[WeightPart, ...]:
    """Return renamed full modules: `theirs` + their ending is `ours` + our ending, for each of `endings`."""
    return tuple(WeightPart(theirs + their_ending, ours + our_ending) for their_ending, our_ending in endings)


def swapped_tensors(names: FamilyNames) -> tuple[str, ...]:
    """Return our tensors whose two halves are swapped in the family's other layout.

    `tensor_patterns` only renames them: the reader of the file swaps the halves.
    """
    modules = [part.ours for part in names.parts if part.index == SWAPPED]
    return tuple(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))


def joined_tensors(names: FamilyNames) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return pattern and our names, in the order of the rows, of each weight that a checkpoint stacks."""
    replacements: dict[str, list[str]] = {}
    for part in names.joined:
        pattern = _pattern(part.ours) + r"\.weight"
        replacements.setdefault(pattern, []).append(f"{_replacement(part.theirs)}.weight")
    return tuple((pattern, tuple(ours)) for pattern, ours in replacements.items())


def _pattern(path: str) -> str:
    """Return the regular expression for a path in which `{n}` stands for the block index."""
    return re.escape(path).replace(re.escape("{n}"), r"(\d+)")


def _replacement(path: str) -> str:
    """Return the replacement text for a path with `{n}`, filled with the number that `_pattern` matched."""
    return path.replace("{n}", r"\1")


def tensor_patterns(names: FamilyNames) -> tuple[tuple[str, str], ...]:
    """Return (pattern, replacement) for the tensors of a checkpoint in the family's other layout.

    A replacement that ends in #n is the nth of the parts that are stacked by rows in our tensor.
    """
    parts = names.parts or tuple(WeightPart(theirs, ours) for theirs, ours in names.aliases)
    counts: dict[str, int] = {}
    patterns = []
    for part in parts:
        suffix = ""
        if part.index is not None and part.index != SWAPPED:
            index = counts.get(part.ours, 0)
            suffix = f"#{index}"
            counts[part.ours] = index + 1
        leaf = r".\2" if "{n}" in part.theirs else r".\1"
        pattern = _pattern(part.theirs) + r"\.(\w+)"
        patterns.append((pattern, _replacement(part.ours) + leaf + suffix))
    for theirs, ours in names.parameters:
        patterns.append((_pattern(theirs), _replacement(ours)))
    return tuple(patterns)
