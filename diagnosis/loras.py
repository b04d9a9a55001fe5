"""Findings about LoRA files: modules without effect, one loud block, and two files that clash."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.report.diagnosis.finding import Finding
from modules.command import quote_command
from modules.console import format_count
from modules.errors import CheckpointError
from networks.block_changes import compute_inner_product, compute_overlaps, list_block_changes
from networks.delta import Delta, read_deltas
from networks.loading import read_lora
from networks.module_factors import group_by_module

EMPTY_FRACTION = 0.1  # of the modules that change nothing
ONE_BLOCK = 0.6  # fraction of the squared norm in a single block
MIN_BLOCKS = 4  # with fewer blocks, one naturally has most of the norm
OVERLAP = 0.25  # cosine of two LoRAs' changes; independent ones have almost 0
LOUD = 4.0  # how many times as large one LoRA's change is as the other's
# modules that read the text and no pixel: the text's stream of blocks with two, keys and values of attention
# to the text, and what the text passes before the blocks
_TEXT_MODULE = re.compile(
    r"(?:^|_)(?:txt|txtmlp|txtfusion|(?<!time_)text|context|cap_embedder|llm_adapter|llm_cond)(?:_|$)"
    r"|(?:cross_attn|crossattn|attn2|cross_attention)_(?:to_)?(?:k|v|kv|key|value)(?:_img|_proj)?$"
    r"|attn_(?:add_[qkv]_proj|to_add_out)$"
)


@dataclass(frozen=True, eq=False)  # compared by identity: a file may be used beside itself
class MeasuredLora:
    """A LoRA file with its changes of weights, by module."""

    path: Path
    deltas: Mapping[str, Delta]  # of the transformer
    text_deltas: Mapping[str, Delta]  # of text encoders
    multiplier: float = 1.0  # strength at which the file is used


def measure_lora(path: Path, multiplier: float = 1.0) -> MeasuredLora:
    """Read a LoRA file of any program.

    Args:
        path: The file.
        multiplier: Strength at which it is used.

    Raises:
        CheckpointError: If the file is missing, damaged, not a LoRA, or has a LoRA for each of two experts.
    """
    lora = read_lora(path, with_texts=True)
    return MeasuredLora(
        path,
        deltas=read_deltas(lora.modules()),
        text_deltas=read_deltas(group_by_module(lora.text_tensors)),
        multiplier=multiplier,
    )


def find_lora_findings(lora: MeasuredLora) -> Iterator[Finding]:
    """Yield findings about a single LoRA file."""
    if not lora.deltas:
        yield Finding(
            "lora-texts-only",
            lora.path.name,
            figure=0,
            limit=1,
            text=f"{lora.path.name} changes {format_count(len(lora.text_deltas), 'module')} of text "
            "encoders, and none of the network that draws.",
            meaning="It can only choose among what the model draws already.",
            remedy="Train without --network_train_text_encoder_only.",
        )
        return
    if all(_TEXT_MODULE.search(name) for name in lora.deltas):
        yield Finding(
            "lora-texts-only",
            lora.path.name,
            figure=0,
            limit=1,
            text=f"All {format_count(len(lora.deltas), 'module')} of {lora.path.name} read the text, such as "
            f"{next(iter(lora.deltas))}; none changes what is drawn.",
            meaning="It can only choose among what the model draws already.",
            remedy="Train without include_patterns and exclude_patterns in --network_args.",
        )
        return
    changes = list_block_changes(lora.deltas)
    known = [delta for delta in lora.deltas.values() if not delta.depends_on_weight]
    empty = [delta for delta in known if compute_inner_product(delta, delta) == 0]
    if known and len(empty) > EMPTY_FRACTION * len(known):
        yield Finding(
            "lora-empty",
            lora.path.name,
            figure=len(empty) / len(known),
            limit=EMPTY_FRACTION,
            text=f"{len(empty)} of {len(known)} modules of {lora.path.name} change nothing: one of their "
            "matrices is zero.",
            meaning="These modules have not been trained: their learning rate was 0, or no step was taken.",
            remedy="Compare --learning_rate and --network_args of the run with the modules that the file "
            "names.",
        )
    total = sum(change.squared_norm for change in changes)
    largest = max(changes, key=lambda change: change.squared_norm)
    if total and len(changes) >= MIN_BLOCKS and largest.squared_norm > ONE_BLOCK * total:
        yield Finding(
            "lora-one-block",
            largest.block,
            figure=largest.squared_norm / total,
            limit=ONE_BLOCK,
            text=f"{largest.squared_norm / total:.0%} of the change of {lora.path.name} is in "
            f"{largest.block}, one of {format_count(len(changes), 'block')}.",
            meaning="A single block that changes so far distorts pictures before the others have learned.",
            remedy="Train with a lower learning rate, or weaken the block in this file: "
            + _weaken_command(lora, largest.block, strength=0.5),
        )


def find_pair_findings(first: MeasuredLora, second: MeasuredLora) -> Iterator[Finding]:
    """Yield findings about two LoRAs that are used together."""
    if not first.deltas.keys() & second.deltas.keys():
        raise CheckpointError(
            f"{second.path} changes no module that {first.path} changes: they are for different models, or "
            "for different parts of one.",
            second.path,
        )
    yield from _find_loud_lora(first, second)
    yield from _find_overlap(first, second)


def _find_loud_lora(first: MeasuredLora, second: MeasuredLora) -> Iterator[Finding]:
    """Yield a finding if one LoRA changes the weights much further than the other."""
    sizes = [
        abs(lora.multiplier) * sum(change.squared_norm for change in list_block_changes(lora.deltas)) ** 0.5
        for lora in (first, second)
    ]
    small, large = sorted(zip(sizes, (first, second), strict=True), key=lambda pair: pair[0])
    if small[0] and large[0] > LOUD * small[0]:
        quiet, loud = small[1], large[1]
        # rounded so that the ratio does not exceed the limit
        ratio = large[0] / small[0] / LOUD
        lower = {loud: math.trunc(100 * loud.multiplier / ratio) / 100, quiet: quiet.multiplier}
        raised = math.ceil(100 * abs(quiet.multiplier) * ratio) / 100
        higher = {loud: loud.multiplier, quiet: math.copysign(raised, quiet.multiplier)}
        yield Finding(
            "loras-loud",
            loud.path.name,
            figure=large[0] / small[0],
            limit=LOUD,
            text=f"{loud.path.name} changes the weights {large[0] / small[0]:.1f} times as far as "
            f"{quiet.path.name}.",
            meaning=f"Beside it {quiet.path.name} is hardly seen.",
            remedy=f"Generate with --lora_multiplier {lower[first]:g} {lower[second]:g}, or "
            f"{higher[first]:g} {higher[second]:g}, for --lora_weight {first.path.name} {second.path.name}; "
            "tools/judge_loras.py --beside finds the highest strength that keeps what was learned.",
        )


def _find_overlap(first: MeasuredLora, second: MeasuredLora) -> Iterator[Finding]:
    """Yield a finding about the block in which two LoRAs are most alike, or most opposed."""
    overlaps = compute_overlaps(first.deltas, second.deltas)
    block, overlap = max(overlaps.items(), key=lambda item: abs(item[1]), default=("", 0.0))
    if first.multiplier * second.multiplier < 0:
        overlap = -overlap
    if abs(overlap) > OVERLAP:
        effect = (
            "the same direction: together they overshoot"
            if overlap > 0
            else "opposite directions: they cancel"
        )
        yield Finding(
            "loras-overlap",
            block,
            figure=overlap,
            limit=OVERLAP,
            text=f"In {block}, the changes of {first.path.name} and {second.path.name} have a cosine of "
            f"{overlap:.2f}.",
            meaning=f"They pull the same weights in {effect}.",
            remedy="Lower --lora_multiplier of both until samples are clean, or leave the block out of one: "
            + _weaken_command(second, block, strength=0),
        )


def _weaken_command(lora: MeasuredLora, block: str, strength: float) -> str:
    """Return the command that writes the file with another strength of one block."""
    name, _, number = block.rpartition("_")
    typed = f"{name}:{number}={strength:g}" if number.isdigit() else f"{block}={strength:g}"
    output = lora.path.with_name(f"{lora.path.stem}-weaker.safetensors")
    words = ["tools/blocks.py", str(lora.path), "--lora_blocks", typed, "--output", str(output)]
    return quote_command(["python", *words])
