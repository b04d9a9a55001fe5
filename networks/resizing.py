"""Reduce the rank of a LoRA: the best approximation of each module's change at a smaller rank.

A module's change is the product of its factors. Keeping its largest singular values gives the nearest
product of that rank (Eckart and Young 1936). Names, other tensors and alpha / rank are unchanged.
"""
# Letters: R rank, K values of a kernel

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.finite import check_finite
from checkpoints.opening import open_checkpoint
from checkpoints.writing import save_tensors
from modules.command import quote_command
from modules.console import format_count, format_size, show_box
from modules.errors import CheckpointError, OptionError
from modules.options import NO_PIXELS, Options, not_needed, option
from modules.text_files import parse_json
from networks.alphas import without_alphas
from networks.formats import diffusers
from networks.kinds import KINDS
from networks.kinds.contract import named
from networks.kinds.lora import LORA
from networks.merging import DTYPES, PRECISIONS, decompose_product
from networks.metadata import STALE, add_hashes, layout_hash
from networks.names.layouts import FOLDED, LAYOUT_KEY, PEFT_FILE
from networks.rank_masks import read_rank_rule
from networks.tensor_names import in_default_spelling

logger = getLogger(__name__)
# `x.lora_down.weight`, `x.lora_A.default.weight`, `x.lora.down.weight`, `x.to_q_lora.down.weight`
_DOWN_NAME = re.compile(
    r"(?P<module>.*?)[._](lora[._]|lora_linear_layer\.)(?P<factor>down|A|a)(?P<suffix>(\.[^.]+)*)"
)
_UP_NAMES = {"down": "up", "A": "B", "a": "b"}
MIN_LEARNED = 1e-6  # a module has learned nothing if its largest singular value is at most this
TOLERANCE = 1e-12  # of cumulative fractions, which may end slightly below 1
DIFFERENT_RANKS = "Dynamic"  # ss_network_dim of a LoRA whose modules have different ranks
# values of --dynamic_method
RATIO = "sv_ratio"
SUM_FRACTION = "sv_cumulative"
NORM_FRACTION = "sv_fro"


class ResizeOptions(Options):
    """Options of `resize_lora.py`."""

    model: Path = option("LoRA file of any dialect", place="there", required=True)
    save_to: Path = option(
        "safetensors file to write, in the dialect of --model",
        place="safetensors",
        must_not_replace="model",
        required=True,
    )
    new_rank: int = option(
        "rank of the new LoRA, or the largest rank with --dynamic_method; smaller ranks are kept",
        default=4,
        minimum=1,
    )
    new_conv_rank: int | None = option(
        "the same for convolutions; default: --new_rank", minimum=1, hint="a rank"
    )
    dynamic_method: str | None = option(
        f"give each module a rank of its own. {RATIO}: the directions that are larger than the largest one "
        f"divided by --dynamic_param; {SUM_FRACTION}: the fewest whose sizes have this share of the sum "
        f"of all; {NORM_FRACTION}: the fewest whose change has this share of the Frobenius norm",
        choices=(RATIO, NORM_FRACTION, SUM_FRACTION),
        needs="dynamic_param",
        hint="for example 0.9, or 10 with sv_ratio",
    )
    dynamic_param: float | None = option(
        f"number of --dynamic_method: at least 1 with {RATIO}, a share above 0 and up to 1 with the others",
        above=0,
        needs="dynamic_method",
    )
    save_precision: str = option("dtype of the factors", default="float", choices=PRECISIONS)
    verbose: bool = option("print how much of each module's change is kept", facts=NO_PIXELS)
    device = not_needed("it takes seconds on the CPU, in float64.", type=str)

    def __post_init__(self) -> None:
        if self.dynamic_method is None or self.dynamic_param is None:
            return
        if self.dynamic_method == RATIO and self.dynamic_param < 1:
            raise OptionError(
                f"--dynamic_param {self.dynamic_param:g}: with --dynamic_method {RATIO} the largest "
                "direction is divided by it, so it must be at least 1. 10 is usual"
            )
        if self.dynamic_method != RATIO and self.dynamic_param > 1:
            raise OptionError(
                f"--dynamic_param {self.dynamic_param:g}: with --dynamic_method {self.dynamic_method} it is "
                "a fraction of at most 1. 0.9 is usual"
            )


@dataclass(frozen=True)
class FactorNames:
    """Tensor names of one module's factors in a LoRA file."""

    module: str
    down: str
    up: str
    core: str | None  # Tucker core of a convolution, between down and up
    alpha: str | None


@dataclass(frozen=True)
class ResizedModule:
    """A module's factors at the new rank, and how much of the old change they preserve."""

    names: FactorNames
    down: Tensor  # R in (kernel), float64
    up: Tensor  # out R (1 1), float64
    old_rank: int
    strength: float  # alpha / rank
    kept_sum: float  # fraction of the sum of the singular values
    kept_norm: float  # fraction of the Frobenius norm of the change
    largest_ratio: float  # largest singular value / smallest one that is kept
    has_learned: bool

    @property
    def rank(self) -> int:
        """The rank after resizing."""
        return len(self.down)

    @property
    def alpha(self) -> float:
        """Alpha that keeps the strength alpha / rank at the new rank."""
        return self.strength * self.rank

    @property
    def is_convolution(self) -> bool:
        """Whether the module is a convolution, so that its down factor has kernel axes."""
        return self.down.ndim > 2


def resize_file(options: ResizeOptions) -> None:
    """Write a LoRA with a smaller rank; both LoRAs are kept in memory.

    Raises:
        CheckpointError: If the file is not a plain LoRA, has alphas in metadata or settings instead of
            tensors, or contains NaN or infinite values.
    """
    tensors, metadata, modules = _read_plain_lora(options.model)
    resized = [_resize_module(names, tensors, options, options.model) for names in modules]
    # new factors get the names of the old factors; other tensors are unchanged
    dtype = DTYPES[options.save_precision]
    for module in resized:
        tensors[module.names.down] = module.down.to(dtype).contiguous()
        tensors[module.names.up] = module.up.to(dtype).contiguous()
        if module.names.core is not None:
            del tensors[module.names.core]
        if module.names.alpha is not None:
            tensors[module.names.alpha] = torch.tensor(module.alpha)
    metadata |= _change_metadata(metadata, resized, options)
    save_tensors(options.save_to, tensors, add_hashes(tensors, metadata))
    if options.verbose:
        for module in resized:
            logger.info(
                "%s",
                f"{module.names.module}: rank {module.rank} of {module.old_rank}, alpha {module.alpha:g}, "
                "sum kept "
                f"{module.kept_sum:.1%}, Frobenius norm kept {module.kept_norm:.1%}, largest / smallest "
                f"{module.largest_ratio:.1f}",
            )
    _show_result(options, resized)


def _read_plain_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[FactorNames]]:
    """Return the tensors of a LoRA file, its metadata without stale keys, and its modules."""
    with open_checkpoint(path) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        _reject_other_kinds(path, shapes, checkpoint.metadata)
        modules = find_factors(shapes)
        if not modules:
            raise CheckpointError(
                f"{path} has no LoRA: it contains no two factors such as x.lora_down.weight and "
                "x.lora_up.weight.\n  Pass a LoRA file to --model.",
                path,
            )
        is_written_here = checkpoint.metadata.get(LAYOUT_KEY) == layout_hash(checkpoint.tensors)
        # in our own files, an alpha that is not a tensor is already in the factors
        if not is_written_here and any(names.alpha is None for names in modules):
            _reject_other_alphas(path, checkpoint.metadata)
        tensors = {name: checkpoint.read(name) for name in shapes}
        metadata = {key: text for key, text in checkpoint.metadata.items() if not key.startswith(STALE)}
    metadata.pop(FOLDED, None)  # alpha / rank by old rank, already multiplied into the factors
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors, metadata, modules


def _reject_other_kinds(
    source: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> None:
    """Raise CheckpointError if a file is not a plain LoRA, or if its active ranks depend on the noise level.

    Args:
        source: Path of the file.
        shapes: Shapes of its tensors, by name.
        metadata: Metadata of the file.
    """
    names = [in_default_spelling(name) for name in shapes]
    all_names = "\n".join(names)
    for kind in KINDS:
        if kind is LORA or not kind.parts:
            continue
        endings = diffusers.describe_kind(kind).endings
        has_parts = any(name.endswith((*kind.parts, *endings)) for name in names)
        # names with the kind's word may also belong to an unsupported format
        if has_parts or re.search(rf"[._]{kind.word}_", all_names):
            command = _plain_file_command(source, "--bake", "RANK")
            raise CheckpointError(
                f"{source} is {named(kind)}, but only LoRAs, whose change is a product of two factors, can "
                f"be resized.\n  Convert it to a plain LoRA first: {command}",
                source,
            )
    rule = read_rank_rule(metadata, source)
    if rule is not None:
        raise CheckpointError(
            f"{source} is {named(rule.kind)}, whose active ranks depend on the noise level "
            f"({rule.in_words()}): resizing would mix active and inactive ranks.\n"
            "  Train it again with a smaller --network_dim.",
            source,
        )


def _reject_other_alphas(source: Path, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError if metadata or PEFT's settings contain alphas, which fit only the old ranks."""
    holders = sorted(metadata.keys() - without_alphas(metadata).keys())
    if "ss_network_alpha" in metadata:
        holders.append("ss_network_alpha")
    if (source.parent / PEFT_FILE).is_file():
        holders.append(PEFT_FILE)
    if holders:
        command = _plain_file_command(source)
        raise CheckpointError(
            f"{source} has modules without their own alpha: {holders[0]} has one for all of them, together "
            f"with their rank.\n  Store alphas next to the factors first. Run: {command}",
            source,
        )


def _plain_file_command(source: Path, *options: str) -> str:
    """Return the convert_lora.py command that writes the LoRA again with its alphas as tensors."""
    command = ["python", "convert_lora.py", "--input", str(source), "--target", "default", *options]
    return quote_command([*command, "--output", "PLAIN.safetensors"])


def find_factors(shapes: Mapping[str, Sequence[int]]) -> list[FactorNames]:
    """Return the modules in a file that have both factors of a LoRA.

    Args:
        shapes: Shapes of the file's tensors, by name.
    """
    modules: list[FactorNames] = []
    for down in shapes:
        match = _DOWN_NAME.fullmatch(down)
        # the factor is a parameter itself (`lora_A`), or the weight of a module (`lora_A.weight`)
        if match is None or not down.endswith((match["factor"], ".weight")):
            continue
        prefix = down[: match.start("factor")]
        suffix = match["suffix"]
        up = f"{prefix}{_UP_NAMES[match['factor']]}{suffix}"  # such as `lora_B` for `lora_A`
        if up not in shapes:
            continue
        core = f"{prefix}mid{suffix}"
        alpha = f"{match['module']}.alpha"
        names = FactorNames(
            module=match["module"],
            down=down,
            up=up,
            core=core if core in shapes else None,
            alpha=alpha if alpha in shapes else None,
        )
        modules.append(names)
    return modules


@dataclass(frozen=True)
class FactorProduct:
    """A module's change as a product of two matrices, not yet multiplied by alpha / rank."""

    up: Tensor  # out R
    down: Tensor  # R in*K
    in_channels: int
    kernel: tuple[int, ...]  # () for a linear layer


def _read_product(names: FactorNames, tensors: Mapping[str, Tensor], source: Path) -> FactorProduct:
    """Return a module's two factors as float64 matrices; a core is multiplied into the down factor."""
    # The core is the third factor of a convolution, `lora_mid`.
    down = tensors[names.down].double()  # rank x in (x kernel), or in_rank x in with a core
    up = tensors[names.up].double()  # out x rank (x 1 ...)
    core = None if names.core is None else tensors[names.core].double()  # out_rank x in_rank (x kernel)
    if not _have_matching_sizes(down, up, core):
        raise CheckpointError(
            f"{source}: the factors of {names.module} do not fit: {list(down.shape)} and {list(up.shape)}.\n"
            "  Pass a complete LoRA.",
            source,
        )
    in_channels = down.shape[1]
    up = up.flatten(1)
    if core is None:
        return FactorProduct(up, down.flatten(1), in_channels, kernel=down.shape[2:])
    down_with_core = torch.einsum("p q ..., q i -> p i ...", core, down.flatten(1))
    return FactorProduct(up, down_with_core.flatten(1), in_channels, kernel=core.shape[2:])


def _have_matching_sizes(down: Tensor, up: Tensor, core: Tensor | None) -> bool:
    """Return whether the factors of a module can be multiplied: up @ down, or up @ core @ down."""
    if min(down.ndim, up.ndim) < 2:
        return False
    rank = len(down) if core is None else len(core)
    if math.prod(up.shape[1:]) != rank:
        return False
    # with a core, only the core has the kernel size; the kernel of the down factor must be 1
    return core is None or (core.shape[1] == len(down) and math.prod(down.shape[2:]) == 1)


def _resize_module(
    names: FactorNames, tensors: Mapping[str, Tensor], options: ResizeOptions, source: Path
) -> ResizedModule:
    """Return a module with factors of its new rank; raise CheckpointError if its factors do not match."""
    product = _read_product(names, tensors, source)
    decomposed = decompose_product(product.up, product.down)
    singular_values = decomposed.singular_values.numpy()
    old_rank = len(tensors[names.down])
    max_rank = options.new_rank
    if product.kernel and options.new_conv_rank is not None:
        max_rank = options.new_conv_rank
    rank = select_rank(
        singular_values, min(max_rank, old_rank), options.dynamic_method, options.dynamic_param
    )
    kept_values = singular_values[:rank]
    # The down and the up factor of a rank, in the module's shape
    # the product's singular vectors are left @ u and right @ vh^T; its singular values go into the up factor
    down = decomposed.vh[:rank] @ decomposed.right.T
    up = decomposed.left @ (decomposed.u[:, :rank] * decomposed.singular_values[:rank])
    kernel_axes = [1] * len(product.kernel)  # the up factor of a convolution has the kernel size 1
    down = down.reshape(rank, product.in_channels, *product.kernel)
    up = up.reshape(*up.shape, *kernel_axes)
    strength = 1.0
    if names.alpha is not None:
        strength = float(tensors[names.alpha]) / old_rank
    return ResizedModule(
        names=names,
        down=down,
        up=up,
        old_rank=old_rank,
        strength=strength,
        kept_sum=_divide(kept_values.sum(), singular_values.sum()),
        kept_norm=_divide(np.linalg.norm(kept_values), np.linalg.norm(singular_values)),
        largest_ratio=_divide(singular_values[0], kept_values[-1]),
        has_learned=bool(singular_values[0] > MIN_LEARNED),
    )


def select_rank(
    singular_values: np.ndarray[Any, Any], maximum: int, method: str | None, param: float | None
) -> int:
    """Return the new rank of a module, 1 to `maximum`, given its singular values.

    A module that has learned nothing gets rank 1.

    Args:
        singular_values: Singular values in descending order.
        maximum: Largest rank.
        method: Value of --dynamic_method; None for the largest rank.
        param: Value of --dynamic_param.
    """
    if singular_values[0] <= MIN_LEARNED:
        return 1
    # without a method, only `maximum` limits the rank
    rank = len(singular_values)
    if method == RATIO:
        assert param is not None
        # values above 1 / param of the largest
        rank = int((singular_values > singular_values[0] / param).sum())
    elif method is not None:
        assert param is not None
        # the Frobenius norm is the root of the sum of squares
        summands = singular_values if method == SUM_FRACTION else singular_values**2
        threshold = param if method == SUM_FRACTION else param**2
        fractions = np.cumsum(summands) / summands.sum()
        # the first rank at which the fraction is reached
        rank = int((fractions < threshold - TOLERANCE).sum()) + 1
    return max(1, min(rank, maximum, len(singular_values)))


def _divide(dividend: Any, divisor: Any) -> float:
    """Return the quotient; 1 if the divisor is 0, as for modules that have learned nothing."""
    return float(dividend / divisor) if divisor else 1.0


def _change_metadata(
    metadata: Mapping[str, str], modules: Sequence[ResizedModule], options: ResizeOptions
) -> dict[str, str]:
    """Return the metadata to update: ranks, alphas, and a comment that describes the resizing."""
    convolutions = [module for module in modules if module.is_convolution]
    linear = [module for module in modules if not module.is_convolution]
    # ss_network_dim describes the linear layers, or the convolutions if there are no linear layers
    rank, alpha = _common_sizes(linear or modules, options)
    old_rank = metadata.get("ss_network_dim")
    if not old_rank:
        old_rank = str(max(module.old_rank for module in modules))
    comment = f"dimension is resized from {old_rank} to {rank}"
    if options.dynamic_method is not None:
        comment = f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param:g} from {old_rank}"
    earlier_comment = metadata.get("ss_training_comment", "")
    changed = {
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_training_comment": f"{comment}; {earlier_comment}",
    }
    arguments = _read_arguments(metadata)
    if convolutions and "conv_dim" in arguments:
        arguments["conv_dim"], arguments["conv_alpha"] = _common_sizes(convolutions, options)
        changed["ss_network_args"] = json.dumps(arguments)
    return changed


def _read_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the --network_args stored in the metadata; {} if they are not a JSON object."""
    try:
        arguments = parse_json(metadata.get("ss_network_args", ""))
    except ValueError:
        return {}
    return dict(arguments) if isinstance(arguments, dict) else {}


def _common_sizes(modules: Sequence[ResizedModule], options: ResizeOptions) -> tuple[str, str]:
    """Return rank and alpha for the metadata; "Dynamic" if they differ between modules with a change."""
    pairs = {(module.rank, module.alpha) for module in modules if module.has_learned}
    if options.dynamic_method is not None or len(pairs) != 1:
        return DIFFERENT_RANKS, DIFFERENT_RANKS
    rank, alpha = pairs.pop()
    return str(rank), str(alpha)


def _show_result(options: ResizeOptions, modules: Sequence[ResizedModule]) -> None:
    """Print a summary: sizes, ranks, and how much of the norm is preserved."""
    # modules that have learned nothing would only distort the averages
    learned = [module for module in modules if module.has_learned] or modules
    kept_percentages = [100 * module.kept_norm for module in learned]
    mean = float(np.mean(kept_percentages))
    spread = float(np.std(kept_percentages))
    new_ranks = _describe_ranks([module.rank for module in learned])
    old_ranks = _describe_ranks([module.old_rank for module in modules])
    rows = [
        ("from", str(options.model)),
        ("to", str(options.save_to)),
        ("size", format_size(options.save_to.stat().st_size)),
        ("rank", f"{new_ranks}; before {old_ranks}"),
        ("modules", str(len(modules))),
        ("kept", f"{mean:.2f} % of the Frobenius norm, spread {spread:.2f} %"),
    ]
    idle = [module for module in modules if not module.has_learned]
    if idle:
        rows.append(("learned nothing", f"{format_count(len(idle), 'module')}, of rank 1 now"))
    if all(module.rank == module.old_rank for module in modules):
        rows.append(("smaller", "no: no module has more ranks than asked for"))
    show_box("The LoRA is resized", rows)


def _describe_ranks(ranks: Sequence[int]) -> str:
    minimum, maximum = min(ranks), max(ranks)
    if minimum == maximum:
        return str(maximum)
    return f"{minimum} to {maximum}, {sum(ranks) / len(ranks):.1f} on average"
