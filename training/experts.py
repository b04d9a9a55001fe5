"""Prepare the transformers of a run, and handle several of them (experts): which one is used and trained."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from checkpoints.stored.forms import prepare
from modules.attention.attend import check_backend
from modules.compile_options import Compilation
from modules.devices import dtype_name
from modules.errors import OptionError
from modules.options import option_values
from modules.speed_options import Quantization
from networks.adapter import OWN_NETWORKS
from networks.builtin_modules import OWN_MODULES
from networks.kinds.contract import named
from networks.names.layouts import EXPERT_VALUES, FOR_BOTH, TRAINED_EXPERT
from networks.options import NetworkOptions
from protocols.families import HIGH_NOISE
from protocols.family import DitSpec, Family, knows_few_steps
from protocols.loading import BlockSharder, Placement
from protocols.rules import ONE_EXPERT, Expert
from runtime import network_setup
from runtime.offload.swap_plan import HostWeights
from runtime.offload.turns import HostCopy
from training.data.timesteps import find_level_range
from training.noise_options import NUM_TIMESTEPS, TimestepOptions
from training.options import TrainingOptions
from training.run_options import LoopOptions

if TYPE_CHECKING:  # loaded only where a LoRA file is given
    from networks.gated_loras import AddedLoras
    from networks.loading import WeightedLora

logger = logging.getLogger(__name__)

TRAINING_ADAPTER = "--training_adapter"


@dataclass(frozen=True)
class ExpertNetworks:
    """Transformers by expert index, with the LoRAs that are active while they run.

    Attributes:
        copies: Host copies of networks that take turns on the device. A network without one stays there.
        loras: The --training_adapter LoRAs of trained networks, or the --sample_lora LoRAs of networks that
            generate samples.
    """

    networks: Sequence[nn.Module]
    copies: Mapping[nn.Module, HostCopy] = field(default_factory=dict)
    loras: "Sequence[AddedLoras]" = ()

    def on_device(self, expert: int) -> nn.Module:
        """Return the network of an expert, on the device.

        If experts take turns on the device, the other networks leave it first. Their weights are frozen, so
        nothing is copied back to the host.
        """
        network = self.networks[expert]
        own = self.copies.get(network)  # None: this network never leaves the device
        if own is None or not own.is_on_device:
            for copy in self.copies.values():
                copy.free_device_memory()
        if own is not None:
            own.to_device()
        return network


def read_adapter(
    options: TrainingOptions, expert: Expert, experts: Sequence[Expert]
) -> "WeightedLora | None":
    """Read --training_adapter for one of the trained experts.

    Returns None if the option is not set, or if the file is for another trained expert.
    """
    path, multiplier = options.frozen.training_adapter, options.frozen.training_adapter_multiplier
    if path is None:
        return None
    from networks.loading import read_lora, read_weighted_lora  # only with an adapter

    expert_in_file = read_lora(path, by_expert=True).expert
    if expert_in_file != expert.name and expert_in_file in [trained.name for trained in experts]:
        logger.info(
            "%s %s is for the other transformer: the %s trains without it.",
            TRAINING_ADAPTER,
            path,
            expert.description,
        )
        return None
    return read_weighted_lora(path, expert.name, multiplier)


def get_network_module(family: Family, options: TrainingOptions) -> str:
    """Return --network_module, or the family's default module; "" in full fine-tuning."""
    return "" if options.network is None else options.network.network_module or family.lora_module


def network_for(options: TrainingOptions, expert: Expert) -> NetworkOptions | None:
    """Return the options of the LoRA trained in an expert, with this expert's initial weights."""
    network, by_expert = options.network, options.by_expert
    if network is None or expert.name != HIGH_NOISE:
        return network
    if by_expert.lora_per_expert:
        network = replace(network, network_weights=by_expert.network_weights_high_noise)
    return network


def check_experts(family: Family, options: TrainingOptions) -> None:
    """Raise OptionError for options that do not support the transformers of this run."""
    by_expert = options.by_expert
    has_two_transformers = len(family.experts) > 1  # of high and of low noise
    if by_expert.lora_per_expert and not has_two_transformers:
        raise OptionError("--lora_per_expert needs two transformers: pass --dit and --dit_high_noise")
    if options.full_dit is not None and has_two_transformers:
        raise OptionError(
            "--dit and --dit_high_noise: whole transformers are trained one at a time, as the weights of two "
            "with their gradients fit no device. Pass one of them, or train a LoRA"
        )
    if by_expert.network_weights_high_noise is not None and not by_expert.lora_per_expert:
        raise OptionError(
            "--network_weights_high_noise: one network is trained for both transformers, and starts from "
            "--network_weights. Use that, or add --lora_per_expert"
        )
    if options.network is not None and has_two_transformers:
        if by_expert.lora_per_expert:
            if options.network.dim_from_weights and by_expert.network_weights_high_noise is None:
                raise OptionError(
                    "--dim_from_weights with --lora_per_expert needs --network_weights_high_noise too: the "
                    "file to take ranks and alphas of the second network from"
                )
        elif options.network.decomposes:  # a DoRA for both transformers
            kind = next(kind for kind in options.network.variants if kind.magnitudes)
            raise OptionError(
                f"--network_args {kind.switch}=True: {named(kind)} learns the norms of a transformer's "
                f"weights, so that two transformers cannot share one. {OWN_NETWORKS}"
            )


def log_experts(
    family: Family,
    options: TrainingOptions,
    table_timesteps: Sequence[TimestepOptions],
    has_sample_only_networks: bool = False,
) -> None:
    """Log the noise levels at which the transformers are trained; warn about few-step transformers.

    Args:
        family: The model family.
        options: Options of the run.
        table_timesteps: Timestep options of each dataset table.
        has_sample_only_networks: Whether samples also use transformers that are not trained.
    """
    experts, all_experts = family.experts, family.defaults.experts
    warning = describe_few_steps(family, options)
    if warning:
        logger.warning("%s", warning)
    if len(experts) == 1 and options.by_expert.offload_inactive_dit and not has_sample_only_networks:
        logger.warning("--offload_inactive_dit is ignored because one transformer is loaded")
    if has_sample_only_networks and options.samples.sample_prompts is None:
        logger.warning(
            "%s is ignored because there is no --sample_prompts", family.abilities.sampling_dit_option
        )
    if len(all_experts) > 1:
        _log_trained_expert(family, options, table_timesteps, has_sample_only_networks)


def _log_trained_expert(
    family: Family,
    options: TrainingOptions,
    table_timesteps: Sequence[TimestepOptions],
    has_sample_only_networks: bool,
) -> None:
    """Log which of a model's two transformers are trained and used for samples, and at which timesteps."""
    experts, all_experts = family.experts, family.defaults.experts
    trained_expert = find_trained_expert(family, table_timesteps)
    for expert in experts:
        network = network_for(options, expert)
        if network is not None and network.network_weights is not None:
            weights_expert = (trained_expert or expert).name
            if (network.network_module or family.lora_module) in OWN_MODULES:
                from networks.loading import read_lora, warn_about_other_expert  # only with LoRA files

                warn_about_other_expert(read_lora(network.network_weights), weights_expert)
    if len(experts) == 1 and options.samples.sample_prompts is not None and not has_sample_only_networks:
        option = family.abilities.sampling_dit_option
        logger.info("Only the trained transformer generates samples; pass %s to use both.", option)
    # if only the expert from 0 on is trained, the boundary is the start of the other one
    boundary = max(expert.min_timestep for expert in experts) or all_experts[-1].min_timestep
    if len(experts) > 1:
        logger.info("Timesteps from %g on train --dit_high_noise, the others --dit.", boundary)
    elif experts[0].min_timestep > 0:
        logger.info("Only timesteps from %g on are trained, the range of --dit_high_noise.", boundary)
    elif trained_expert is None:
        # Warn that one of two transformers is trained at all timesteps
        option_for_low_noise = "--max_timestep"
        option_for_high_noise = "--min_timestep"
        bound = round(boundary)
        if options.timesteps.timestep_sampling == "sigma":  # counts its bounds from the noisy end
            option_for_low_noise, option_for_high_noise = option_for_high_noise, option_for_low_noise
            bound = NUM_TIMESTEPS - bound
        logger.warning(
            "--dit is trained at all timesteps, but in a generation with two transformers it works below %g "
            "only. Recommended: %s %d --preserve_distribution_shape (or %s %d if it is the transformer for "
            "high noise).",
            boundary,
            option_for_low_noise,
            bound,
            option_for_high_noise,
            bound,
        )


def describe_few_steps(family: Family, options: TrainingOptions) -> str:
    """Return a warning if a transformer that was distilled for few steps would lose this ability, else "".

    With a training adapter it keeps the ability; a warning then names options that conflict with the adapter.
    """
    if options.frozen.training_adapter is not None:
        from training.adapted import list_adapter_warnings  # only with an adapter

        return list_adapter_warnings(family, options)
    # an embedding or a network with control images does not change the transformer
    changes_transformer = options.network is not None or options.full_dit is not None
    if options.features.keeps_few_step_ability or not (changes_transformer and knows_few_steps(family)):
        return ""
    evidence = family.few_steps_evidence()
    if evidence is None:
        return ""
    # The warning that training unlearns few steps, with advice on how to keep the ability
    trains_whole_model = options.full_dit is not None
    unlearned = family.few_steps.unlearned_pronoun
    consequence = family.few_steps.consequence
    beginning = (
        f"The transformer may be distilled for few steps ({evidence}). If it is, plain training unlearns"
    )
    if family.few_steps.applies_to_all_files:
        beginning = (
            f"The transformer {family.few_steps.distillation_clause} ({evidence}). Plain training unlearns"
        )
    if trains_whole_model:  # without a frozen model, there are no targets that keep the ability
        advice = family.few_steps.advice_for_full_training
        return f"{beginning} {unlearned}: {consequence}. {advice}."
    advice = family.few_steps.advice_for_lora
    warning = f"{beginning} {unlearned}: with the trained network {consequence}. {advice}."
    if family.few_steps.targets:
        targets = ", or ".join(target.options for target in family.few_steps.targets)
        warning += (
            f" If you train this one, docs/targets.md explains how to keep more of {unlearned}: {targets}."
        )
    return warning


def expert_metadata(
    family: Family, options: TrainingOptions, table_timesteps: Sequence[TimestepOptions], expert_name: str
) -> dict[str, str]:
    """Return the metadata that names the transformer (expert) for which a file was trained.

    Args:
        family: The model family.
        options: Options of the run.
        table_timesteps: Timestep options of each dataset table.
        expert_name: Name of the expert that the file is for; empty if it is for all trained experts.
    """
    experts = family.experts
    if len(experts) > 1 and not expert_name:
        return {TRAINED_EXPERT: FOR_BOTH}
    trained_name: str | None = expert_name
    if not expert_name:
        trained_expert = find_trained_expert(family, table_timesteps)
        trained_name = None if trained_expert is None else trained_expert.name
    if trained_name is None:
        return {}
    # the value that files record, by the name of the expert
    recorded_values = {name: value for value, name in EXPERT_VALUES.items()}
    metadata = {TRAINED_EXPERT: recorded_values[trained_name]}
    file_names = {expert.name: file.name for expert, file in zip(experts, family.dit_files, strict=False)}
    if expert_name in file_names and not options.metadata.no_metadata:
        metadata["ss_sd_model_name"] = file_names[expert_name]
    return metadata


def find_trained_expert(family: Family, table_timesteps: Sequence[TimestepOptions]) -> Expert | None:
    """Return which expert (high or low noise) a run's only transformer is; None if unknown or with several.

    If its file does not name the expert, the range of the run's timesteps decides.

    Args:
        family: The model family.
        table_timesteps: Timestep options of each dataset table.
    """
    experts, default = family.experts, family.defaults.experts
    if len(experts) > 1 or len(default) == 1:  # several, or a family of a single transformer
        return None
    if experts != ONE_EXPERT:  # the file names its expert
        return experts[0]
    lowest, highest = find_level_range(table_timesteps, family.noise)
    fitting_experts = [
        expert for expert in default if expert.min_timestep <= lowest and highest <= expert.max_timestep
    ]
    return fitting_experts[0] if fitting_experts else None


AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}  # --mixed_precision -> dtype


def choose_placement(
    options: TrainingOptions, device: torch.device, quantization: Quantization | None, trained: bool = True
) -> Placement:
    """Return the device and the dtype of the DiT.

    A frozen DiT keeps the file's dtype; one whose weights are trained is in bf16 (--full_bf16) or float32.
    With `trained` False it is one that only samples use.
    """
    full_dit = options.full_dit if trained else None
    storage_dtype: torch.dtype | None = None
    if full_dit is not None:
        storage_dtype = torch.bfloat16 if full_dit.full_bf16 else torch.float32
    return Placement(
        device,
        storage_dtype=storage_dtype,
        fp8_compute_dtype=torch.float16 if options.accelerator.mixed_precision == "fp16" else None,
        attention=options.speed.attention.choice,
        quantization=quantization,
    )


def set_up_network(
    dit: nn.Module,
    spec: DitSpec,
    loop: LoopOptions,
    device: torch.device,
    compilation: Compilation | None = None,
    host_weights: HostWeights | None = None,
    block_sharder: BlockSharder | None = None,
) -> None:
    """Compile and checkpoint the blocks, and set up swapping or sharding. Call after attaching a LoRA.

    --gradient_checkpointing_cpu_offload means that memory is short, so it also computes feed-forward layers
    in pieces.

    Args:
        dit: The transformer.
        spec: Names of the network's blocks.
        loop: Options of the training loop.
        device: Device of the run.
        compilation: How to compile; None does not compile.
        host_weights: Host memory with the weights of swapped blocks; None if none is swapped.
        block_sharder: Object that split the blocks over processes during loading; None if they are complete.
    """
    cpu_offload = loop.gradient_checkpointing_cpu_offload
    checkpointing: network_setup.Checkpointing | None = None  # None: the blocks keep their activations
    if loop.gradient_checkpointing:
        checkpointing = network_setup.Checkpointing(loop.gradient_checkpointing_keep is not None, cpu_offload)
    network_setup.set_up_network(
        dit,
        spec,
        device,
        compilation=compilation,
        host_weights=host_weights,
        checkpointing=checkpointing,
        in_pieces=cpu_offload,
        block_sharder=block_sharder,
    )
    dit.train(loop.gradient_checkpointing)  # only checkpointing depends on the mode: there is no dropout


def check_computing(family: Family, options: TrainingOptions, device: torch.device) -> Quantization | None:
    """Check before loading that the device supports the precision, attention and quantization options.

    Returns:
        The quantization of the frozen weights, adapted to the matrix products that the device supports; None
        if they are not quantized.

    Raises:
        OptionError: If the quantization, the attention or the precision is not available.
    """
    requested = options.speed.fp8.quantization
    quantization = None if requested is None else prepare(requested, device)
    autocast = AUTOCAST.get(options.accelerator.mixed_precision)  # None without mixed precision
    placement = choose_placement(options, device, quantization)
    check_backend(
        placement.attention,
        placement.device,
        lambda: autocast or family.compute_dtype(placement),  # the second reads the header of a file
        training=True,
    )
    if autocast is not None:
        check_dtype(family, options, family.compute_dtype(placement))
    return quantization


def check_dtype(family: Family, options: TrainingOptions, dtype: torch.dtype) -> None:
    """Raise OptionError if --mixed_precision does not match the model's compute dtype."""
    precision = options.accelerator.mixed_precision
    autocast = AUTOCAST.get(precision)
    if autocast is None or dtype in {autocast, torch.float32}:
        return
    casts = f", or --dit_dtype {precision}" if "dit_dtype" in option_values(family.options) else ""
    raise OptionError(
        f"--mixed_precision {precision}: the model is {dtype_name(dtype)}. Use --mixed_precision no, or the "
        f"model's dtype{casts}."
    )
