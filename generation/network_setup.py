"""Load the networks of a generation with LoRAs, quantization, compilation and swapping."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from checkpoints.opening import open_checkpoint
from checkpoints.stored.forms import prepare
from generation.experts import Check
from generation.options import GenerationOptions
from generation.script_options import as_typed
from modules.attention.attend import check_backend
from modules.devices import get_compute_dtype, separate_stream, warn_if_emulated
from modules.errors import OptionError
from modules.options import override_options
from modules.speed_options import Quantization
from networks.names.layouts import FOR_BOTH
from networks.use_options import LoraPatternOptions, multipliers_for
from protocols.families import HIGH_NOISE
from protocols.family import Family
from protocols.loading import BlockSharder, Placement
from protocols.rules import Expert
from runtime.network_setup import make_host_weights, set_up_network
from runtime.offload.swap_plan import HostWeights
from runtime.options import GenerationSpeedOptions
from runtime.run_blocks import get_stage_files
from runtime.ways.composing import finish_network, make_block_sharder

if TYPE_CHECKING:  # loaded only for LoRA files, and for networks that take turns
    from networks.apply import Change, LoraPatch, OriginalWeights
    from networks.loading import WeightedLora
    from runtime.offload.turns import HostCopy

LorasByExpert = Sequence[Sequence["WeightedLora"]]  # LoRAs for each of `Family.experts`, in the same order


@dataclass(frozen=True)
class DitLoader:
    """Loads a model's experts to the device, with LoRAs merged, and blocks compiled and swapped."""

    family: Family
    loras_by_expert: LorasByExpert
    device: torch.device
    options: GenerationOptions
    quantization: Quantization | None
    # for each expert, keeps the original weights for switching LoRAs; None: LoRAs are merged
    originals: "Sequence[OriginalWeights] | None" = None

    def load_to_host(self, expert: int, check: Check) -> "tuple[nn.Module, HostCopy]":
        """Load an expert into host memory while another one runs.

        LoRAs are merged and weights quantized on the device, as in any load, so that the results are equal.

        Args:
            expert: Index of the expert.
            check: Called for each tensor; it may raise to stop loading.

        Returns:
            The network, and the `HostCopy` that moves it to the device.
        """
        from runtime.offload.turns import HostCopy  # only for networks that take turns

        host_weights = None
        if self.device.type != "cpu":
            swap = self.options.speed.swap
            host_weights = make_host_weights(self.family.dit, swap, self.device, all_weights=True)
        with separate_stream(self.device):  # not in the queue of the expert that runs
            dit = self(expert, host_weights, check)
            return dit, HostCopy(dit, self.device, host_weights)

    def __call__(
        self, expert: int, host_weights: HostWeights | None = None, check: Check | None = None
    ) -> nn.Module:
        """Load an expert with its LoRAs, compiled and with swapped blocks according to the options.

        Args:
            expert: Index of the expert.
            host_weights: Which weights stay in host memory; None for the weights of swapped blocks.
            check: Called for each tensor; it may raise to stop loading.

        Raises:
            OptionError: If a LoRA does not fit.
        """
        family = self.family
        speed = self.options.speed
        host = host_weights or make_host_weights(family.dit, speed.swap, self.device)
        # with several processes, each may load only some of the blocks
        blocks = make_block_sharder(speed, self.device) if speed.modes.hooks.make_block_sharder else None
        dit = self._load_with_loras(expert, host, blocks, check)
        dit.eval().requires_grad_(False)
        if get_stage_files(dit):
            from networks.gated_loras import add_stage_loras  # only with LoRAs of stages

            add_stage_loras(dit, is_compiled=speed.compilation.choice is not None)
        set_up_network(
            dit,
            family.dit,
            self.device,
            compilation=speed.compilation.choice,
            host_weights=host,
            block_sharder=blocks,
        )
        if speed.modes.hooks.finish_network:
            finish_network(dit, speed, self.device)
        return dit

    def _load_with_loras(
        self, expert: int, host: HostWeights | None, blocks: BlockSharder | None, check: Check | None
    ) -> nn.Module:
        """Load an expert; merge LoRAs into its weights while they are read, and attach all other LoRAs."""
        loras, t_loras = self._separate_t_loras(expert)
        lora_patch: LoraPatch | None = None
        if loras and not self.originals:
            from networks import apply, rounding  # only with LoRAs

            rule = rounding.LoraRounding(self.options.lora_rounding)
            lora_patch = apply.LoraPatch(loras, rounding=rule, family=self.family.name)
        # to switch LoRAs later, the original weights are recorded instead of merging LoRAs into them
        patch = self.originals[expert] if self.originals else lora_patch
        placement = Placement(
            self.device,
            attention=self.options.speed.attention.choice,
            patch=patch,
            leave_unmerged=lora_patch.leave_unmerged if lora_patch else None,
            quantization=self.quantization,
            host_weights=host,
            block_sharder=blocks,
            check=check,
        )
        dit = self.family.load_dit(placement, expert)
        warn_if_emulated(self.device, get_compute_dtype(dit), "the transformer")
        if patch is not None:
            patch.check()
        if lora_patch is not None and lora_patch.unmerged:  # those of quantized layers
            self._attach_loras(dit, lora_patch.unmerged)
        if t_loras:
            from networks.unmerged_loras import masked_changes  # only with T-LoRAs

            self._attach_loras(dit, masked_changes(dit, t_loras))
        return dit

    def _attach_loras(self, dit: nn.Module, changes: "Mapping[str, Sequence[Change]]") -> None:
        """Add LoRAs that cannot be merged into weights to the layers that they change."""
        from networks.unmerged_loras import add_unmerged  # only with LoRAs of quantized layers, and T-LoRAs

        add_unmerged(dit, changes, self.device, get_compute_dtype(dit))

    def _separate_t_loras(self, expert: int) -> "tuple[list[WeightedLora], list[WeightedLora]]":
        """Return an expert's (LoRAs to merge into weights, T-LoRAs); T-LoRAs mask ranks by timestep."""
        if not self.loras_by_expert or not self.loras_by_expert[expert]:
            return [], []
        from networks.loading import select_network_part  # only with LoRAs
        from networks.rank_masks import read_rank_rule

        dit_uses = select_network_part(self.loras_by_expert[expert], selects_text_encoders=False)
        if not any(read_rank_rule(use.lora.metadata) for use in dit_uses):
            return dit_uses, []
        from networks.unmerged_loras import split_masked  # only with T-LoRAs

        return split_masked(dit_uses)


def dit_loader(
    family: Family,
    loras_by_expert: LorasByExpert,
    device: torch.device,
    options: GenerationOptions,
    originals: "Sequence[OriginalWeights] | None" = None,
) -> DitLoader:
    """Make the loader of a family's experts.

    Args:
        family: The model family.
        loras_by_expert: LoRA files by expert; empty if no expert has any.
        device: Device of the run.
        options: Options of the run.
        originals: Original weights by expert, for switching LoRAs.

    Raises:
        OptionError: If an option is unavailable on the device.
    """
    quantization = options.speed.fp8.quantization
    if quantization is not None:
        quantization = prepare(quantization, device)
    return DitLoader(
        family, loras_by_expert, device, options=options, quantization=quantization, originals=originals
    )


logger = logging.getLogger(__name__)

# key of an expert -> option for its LoRAs; "": the first expert, or the only one
LORA_OPTIONS = {"": "--lora_weight", HIGH_NOISE: "--lora_weight_high_noise"}


def list_loras(options: GenerationOptions) -> dict[str, list[tuple[Path, float]]]:
    """Return the LoRA files and strengths by expert; the key "" is the only or the low-noise expert."""
    files = options.experts.lora_weight_high_noise or ()
    high = multipliers_for(files, options.experts.lora_multiplier_high_noise, "--lora_multiplier_high_noise")
    low = zip(options.lora.lora_weight or (), options.lora.multipliers(), strict=True)
    return {"": [*low], HIGH_NOISE: [*zip(files, high, strict=True)]}


def with_blocks(options: GenerationOptions, blocks: Sequence[str] | None) -> GenerationOptions:
    """Return the options with other strengths of blocks, a text for each LoRA file; None for none."""
    texts = None if blocks is None else tuple(blocks)
    return replace(options, lora_patterns=replace(options.lora_patterns, lora_blocks=texts))


def get_lora_key(expert: Expert) -> str:
    """Return an expert's key in `LORA_OPTIONS`: its name, or "" for the low-noise or the only expert."""
    return expert.name if expert.name in LORA_OPTIONS else ""


def expert_loras(
    family: Family, options: GenerationOptions, with_texts: bool = False
) -> "tuple[tuple[WeightedLora, ...], ...]":
    """Return the LoRAs of each of the family's experts, in the order of the experts.

    A file that contains a LoRA for each expert is used for both, no matter which option names it. Patterns
    apply to files in this order: --lora_weight, then --lora_weight_high_noise.

    Args:
        family: The model family.
        options: Options of the run.
        with_texts: Whether to read changes of text encoders too, and embeddings of prompt words if the family
            supports them.

    Raises:
        OptionError: If LoRAs are given for an expert that the run does not have.
        CheckpointError: If a LoRA file is not valid or does not fit the model.
    """
    files_by_key = list_loras(options)
    patterns = options.lora_patterns
    has_patterns = bool(patterns.include_patterns or patterns.exclude_patterns or patterns.lora_blocks)
    if not any(files_by_key.values()) and not has_patterns:
        return ((),) * len(family.experts)
    loras_by_key = _read_loras(files_by_key, patterns, with_texts)
    expert_keys = [get_lora_key(expert) for expert in family.experts]
    is_for_missing_expert = any(loras for key, loras in loras_by_key.items() if key not in expert_keys)
    if len(expert_keys) > 1 or is_for_missing_expert:
        _check_experts(loras_by_key, expert_keys)
        _warn_of_missing_experts(loras_by_key, expert_keys)
    loras_by_expert = tuple(tuple(_select_loras(expert, loras_by_key)) for expert in family.experts)
    runs_transformer = not options.latent_path
    if runs_transformer and any(lora_use.lora.depth_variants for lora_use in chain(*loras_by_expert)):
        # The LoRAs with their blocks mapped to those of the transformer's file, which may be deeper
        from networks.depth_variants import fit_to_file  # only for models with deeper variants

        files = zip(loras_by_expert, family.dit_files, strict=True)
        return tuple(tuple(fit_to_file(loras, dit_file)) for loras, dit_file in files)
    return loras_by_expert


def _read_loras(
    files_by_key: Mapping[str, Sequence[tuple[Path, float]]], patterns: LoraPatternOptions, with_texts: bool
) -> "dict[str, list[WeightedLora]]":
    """Read LoRA files; return the LoRAs by the key of the expert whose option names them."""
    from networks.loading import read_weighted_loras  # only with LoRAs

    all_files = [*chain(*files_by_key.values())]
    # in one call, because the patterns count through the files of both options
    all_loras = iter(read_weighted_loras(all_files, patterns, with_texts, with_embeddings=with_texts))
    return {key: list(islice(all_loras, len(files))) for key, files in files_by_key.items()}


def _select_loras(
    expert: Expert, loras_by_key: "Mapping[str, Sequence[WeightedLora]]"
) -> "list[WeightedLora]":
    """Return an expert's LoRAs: its own files, and other files that contain a part for each expert."""
    own_key = get_lora_key(expert)
    loras = [*loras_by_key[own_key]]
    own_paths = {lora_use.lora.path for lora_use in loras}
    other_loras = chain(*(others for key, others in loras_by_key.items() if key != own_key))
    loras += (
        lora_use
        for lora_use in other_loras
        if lora_use.lora.loras_by_expert and lora_use.lora.path not in own_paths
    )
    # of files with a LoRA for each expert, only this expert's part is used
    if expert.name or any(lora_use.lora.loras_by_expert for lora_use in loras):
        return [lora_use.for_expert(expert.name) for lora_use in loras]
    return loras


def _check_experts(loras_by_key: "Mapping[str, Sequence[WeightedLora]]", expert_keys: Sequence[str]) -> None:
    """Raise OptionError if LoRAs are given for an expert that the run does not have."""
    for key, loras in loras_by_key.items():
        if key in expert_keys:
            continue
        # --lora_weight (key "") may list files that contain a LoRA for each expert
        is_for_missing_expert = any(not lora_use.lora.loras_by_expert for lora_use in loras)
        names_missing_expert = bool(key and loras)
        if is_for_missing_expert or names_missing_expert:
            dit = f"--dit_{key}" if key else "--dit"
            remedy = "add it, or omit the option"
            if expert_keys[0]:
                remedy = f"use {LORA_OPTIONS[expert_keys[0]]}, or add {dit}"
            raise OptionError(f"{LORA_OPTIONS[key]} is for {dit}, which is not given: {remedy}")


def _warn_of_missing_experts(
    loras_by_key: "Mapping[str, Sequence[WeightedLora]]", expert_keys: Sequence[str]
) -> None:
    """Warn about LoRAs that were trained for all experts but are used in only some of them."""
    paths_by_key = {key: {lora_use.lora.path for lora_use in loras} for key, loras in loras_by_key.items()}
    for key, loras in loras_by_key.items():
        for lora_use in loras:
            if lora_use.lora.expert != FOR_BOTH:
                continue
            path = lora_use.lora.path
            missing_options = [
                LORA_OPTIONS[expert_key]
                for expert_key in expert_keys
                if expert_key != key and path not in paths_by_key[expert_key]
            ]
            if missing_options:
                logger.warning(
                    "%s was trained for both experts and is used for only one of them: pass it to %s too",
                    path,
                    " and ".join(missing_options),
                )


# --- which options of --optimized are available
# ------------------------------------------------------------------------------------------------------------

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


def leave_out_missing(family: Family, options: GenerationOptions, device: torch.device) -> GenerationOptions:
    """Turn off the options of --optimized that are unavailable here, each with a warning, and log the rest.

    Options that the user gave by name are kept: if one is unavailable, it causes an error later.
    """
    checks = _make_preset_checks(family, device)
    speed = options.speed
    left_out: list[str] = []
    for name in checks:
        if name not in options.speed.by_preset:
            continue
        try:
            checks[name](speed)
        except OptionError as error:
            logger.warning("--optimized skips --%s here. %s", name, error)
            speed = _without(speed, name)
            left_out.append(name)
    _log_preset(options, left_out)
    if not left_out:
        return options
    settings: dict[str, Any] = {
        name: value for name, value in options.settings.items() if name not in left_out
    }
    if speed.fp8.fp8 and not options.speed.fp8.fp8:  # set instead of --fp8_scaled
        settings["fp8"] = True
    return replace(options, speed=speed, settings=settings)


def _make_preset_checks(
    family: Family, device: torch.device
) -> dict[str, Callable[[GenerationSpeedOptions], object]]:
    """Return a check for each option of --optimized; it raises OptionError if the option is unavailable."""
    dit_files = family.dit_files  # raises the error for a missing file first

    def check_attention(speed: GenerationSpeedOptions) -> None:
        placement = Placement(device, attention=speed.attention.choice)
        check_backend(placement.attention, device, lambda: family.compute_dtype(placement), training=False)

    def check_compile(speed: GenerationSpeedOptions) -> None:
        from runtime.compile import check_compilation  # only with --compile

        check_compilation(speed.compilation.choice, device)

    return {
        "attn_mode": check_attention,
        "compile": check_compile,
        "fp8_scaled": lambda _: _check_rounding(dit_files, device),
        "fp8_fast": lambda speed: speed.fp8.quantization and prepare(speed.fp8.quantization, device),
        "fp16_accumulation": lambda _: _check_fp16_sums(device),
    }


def _log_preset(options: GenerationOptions, left_out: Sequence[str]) -> None:
    """Log which options --optimized sets, which are unavailable here, and which the user set differently."""
    speed = options.speed
    values = dict.fromkeys(speed.by_preset, True) | dict(options.settings)
    used = [as_typed(values, name) for name in speed.by_preset if name not in left_out]
    parts = [f"--optimized sets {' '.join(used) or 'nothing'}"]
    if left_out:
        names = ", ".join(as_typed(values, name) for name in left_out)
        parts.append(f"skipped, see the warnings above: {names}")
    if speed.not_by_preset:
        names = ", ".join(f"--{name}" for name in speed.not_by_preset)
        parts.append(f"as you set them: {names}")
    logger.info("%s", "; ".join(parts))


def _without(speed: GenerationSpeedOptions, name: str) -> GenerationSpeedOptions:
    """Return the options with one option of the --optimized preset turned off."""
    changes: dict[str, Any] = {name: "torch" if name == "attn_mode" else False}
    if name == "fp8_scaled":  # a file in fp8 stays in fp8
        changes["fp8"] = True
    by_preset = tuple(option for option in speed.by_preset if option != name)
    return override_options(replace(speed, by_preset=by_preset), changes)


def _check_rounding(files: Sequence[Path], device: torch.device) -> None:
    """Raise OptionError if the weights cannot be quantized to 8 bits while loading."""
    if device.type == "mps":
        raise OptionError("Apple's GPUs do not support 8-bit formats.")
    for path in files:
        with contextlib.closing(open_checkpoint(path)) as checkpoint:
            infos = checkpoint.tensors.values()
            is_rounded = any(info.packing is not None or info.dtype in FP8_DTYPES for info in infos)
        if is_rounded:
            raise OptionError(f"{path} is quantized already, and rounding it again would only lose more.")


def _check_fp16_sums(device: torch.device) -> None:
    if device.type != "cuda":
        raise OptionError(f"It is for matrix products on a CUDA GPU, and this run computes on {device.type}.")
