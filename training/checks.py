"""Check a run's options and file headers before gigabytes are loaded; list options without effect."""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Parameter

from checkpoints.dits import bare_names
from checkpoints.opening import open_checkpoint
from dataset.table import DatasetTable
from modules.atomic_write import check_space
from modules.console import quiet
from modules.devices import DTYPES, dtype_name
from modules.errors import CheckpointError, OptionError
from modules.private_torch import without_dynamo
from networks.adapter import check_network
from networks.builtin_modules import OWN_MODULES
from networks.builtin_networks import smallest_lora_bytes
from networks.kinds import KINDS
from networks.kinds.composing import RANKED_NETWORKS, find_network_kind
from networks.kinds.contract import named
from networks.lora_format import LoraFormat, select_format
from networks.lora_settings import REG_RATES, read_rates
from networks.options import NetworkOptions
from protocols.family import Family, LearningEncoder
from protocols.full_model import LearningParts, trains_checkpoint
from protocols.rules import Expert
from runtime.offload.swap_plan import check_swap
from runtime.ways.contract import RunUses
from training.data.table_times import explain_ignored_options
from training.experts import TRAINING_ADAPTER, check_experts, network_for, read_adapter
from training.learner import FULL_RATE, LORA_RATE, NetworkSpec
from training.learning_options import FIND_RATE
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import check_rates, make_optimizer
from training.options import TrainingOptions
from training.other_models import NO_OTHERS, OtherFamilies, require_equal_shapes
from training.run_options import MAX_STEPS
from training.unused_options import list_without_effect

if TYPE_CHECKING:  # only with LoRA files
    from networks.loading import LoraFile, WeightedLora

logger = logging.getLogger(__name__)


def check_before_loading(
    family: Family, options: TrainingOptions, network_spec: NetworkSpec, others: OtherFamilies = NO_OTHERS
) -> None:
    """Check everything about a run that can be checked before networks are loaded.

    1. The model files.
    2. The options: experts, division over GPUs, block swap, features, schedule.
    3. The trained network and its learning rates.
    4. Samples, and the disk space for saved files.

    Args:
        family: The model family.
        options: Options of the run.
        network_spec: Description of what the run trains: a kind of network, or the whole DiT.
        others: Models in addition to the trained one.

    Raises:
        UserError: If the run is not possible.
    """
    sampling = others.sampling
    family.check_named_files()
    if options.full_dit is not None:
        reject_quantized_bases(family)
    for check_files in options.features.on.check_files:
        check_files(family, others)
    if sampling is not None:
        sampling.check_named_files()
        option = family.abilities.sampling_dit_option
        require_equal_shapes(sampling, family, option, "what is trained would not fit both")

    check_experts(family, options)
    if options.speed.modes.hooks.check_uses:
        # the active modes, which divide a run over processes, check what the run uses
        run_uses = list_run_uses(family, options, others)
        for check_mode in options.speed.modes.hooks.check_uses:
            check_mode(run_uses)
    counts = family.block_counts()
    swap = options.speed.swap
    if counts and swap.blocks_to_swap and not swap.is_auto:
        check_swap(family.dit, swap.number, counts)
    for check in options.features.on.check:
        check(family, counts)
    check_schedule(options, options.loop.known_steps)

    with quiet():
        select_lora_format(family, network_spec.lora_options)  # only for its errors
    if network_spec.custom is not None:
        network_spec.custom.check()
    if network_spec.lora_options is not None:
        check_networks(family, options)
    if options.lora_parts is not None or (options.network is not None and options.network.network_args):
        # not every optimizer supports different learning rates
        rates = _list_rates(options)
        if len(rates) > 1:
            check_rates(options.optimizer, rates)

    samples = options.samples
    has_prompts = samples.sample_prompts is not None
    if has_prompts or samples.sample_lora or samples.preview.preview_latent_every is not None:
        _check_samples(sampling or family, options)
    folder, name = options.saving.output_dir, options.saving.output_name
    if folder is not None and name is not None:
        check_space(folder / f"{name}.safetensors", _find_smallest_file(family, options))


def reject_quantized_bases(family: Family) -> None:
    """Raise CheckpointError if a transformer that is fully fine-tuned has weights in 8 or 4 bits."""
    for path in family.dit_files:
        with open_checkpoint(path) as checkpoint:
            infos = checkpoint.tensors.values()
        # dtypes of one byte, such as fp8
        narrow_dtypes = [info.dtype for info in infos if info.dtype.itemsize == 1]
        if any(info.packing is not None for info in infos):
            state = "quantized"
        elif narrow_dtypes:
            state = f"in {dtype_name(narrow_dtypes[0])}"
        else:
            continue
        repositories = " or ".join(family.release.repositories)
        raise CheckpointError(
            f"{path} is {state}, and the steps of a training of all weights would be lost in rounding.\n"
            f"  Pass the bf16 file of the model ({repositories}), make one of yours "
            "(tools/quantise.py FILE RESULT --form bf16), or train a LoRA.",
            path,
        )


def check_schedule(options: TrainingOptions, total_steps: int | None) -> None:
    """Create the optimizer and its schedule for a dummy weight. Raises UserError if that fails.

    Args:
        options: Options of the run.
        total_steps: Steps of the whole run; None if unknown: the maximum is assumed, for which no schedule is
            too long.
    """
    with quiet(), without_dynamo():
        dummy_group: Mapping[str, object] = {
            "params": [Parameter(torch.zeros(2, 2))],
            "lr": options.optimizer.learning_rate,
        }
        optimizer, _ = make_optimizer(options.optimizer, [dummy_group])
        make_lr_schedule(options.lr_schedule, optimizer, total_steps or MAX_STEPS)


def _check_samples(family: Family, options: TrainingOptions) -> None:
    """Raise UserError if previews, prompts, or the LoRAs of --sample_lora cannot be used."""
    samples = options.samples
    if samples.preview.preview_latent_every is not None:
        from blissful_tuner.latent_preview import check_preview  # only with previews

        check_preview(samples.preview, family.latent)
    with quiet():
        if samples.sample_prompts is not None:
            from training.samples import read_requests  # only with prompts

            read_requests(family, samples.sample_prompts)  # only for its errors: prompts are read again later
        if samples.sample_lora:
            # Raise UserError if LoRAs of --sample_lora do not fit a transformer
            multiplier_by_file = samples.loras()
            from networks.apply import check_loras_fit
            from networks.gated_loras import reject_magnitudes  # only with LoRA files
            from networks.loading import read_weighted_lora

            # a family may have no files of its transformer yet: then the LoRAs are read and not compared
            for expert, file in zip_longest(family.experts, family.dit_files):
                weighted_loras = [
                    read_weighted_lora(path, expert.name, multiplier)
                    for path, multiplier in multiplier_by_file
                ]
                for weighted_lora in weighted_loras:
                    reject_magnitudes(weighted_lora.lora, "--sample_lora")
                if weighted_loras and file is not None:
                    # some transformers have a second file, such as one with additional blocks
                    check_loras_fit(file, weighted_loras, family.file_beside(file))


def _list_rates(options: TrainingOptions) -> dict[str, float]:
    """Return the learning rates of the networks' parts, by the option that sets each."""
    # Parts with rate 0 are not trained and left out. Parts that are known only after loading are left out
    # too. A key names an option, with its value where one option sets several rates.
    parts = options.lora_parts
    dit_option, dit_rate = "--learning_rate", options.optimizer.learning_rate
    if parts is not None and parts.trains_dit and parts.unet_lr is not None:
        dit_option, dit_rate = "--unet_lr", parts.unet_lr
    rates = {dit_option: dit_rate}
    trains_text_encoders = parts is not None and parts.trains_text_encoders
    if parts is not None and trains_text_encoders:
        text_rates = {f"--text_encoder_lr {rate:g}": rate for rate in parts.text_encoder_lr or ()}
        if parts.trains_dit:
            rates |= text_rates
        elif text_rates:  # otherwise text encoders use --learning_rate
            rates = text_rates
    if options.network is not None and options.network.network_args:
        rates |= _list_network_rates(options.network, dit_rate, trains_text_encoders)
    return {option: rate for option, rate in rates.items() if rate > 0}


def _list_network_rates(network: NetworkOptions, base: float, trains_text_encoders: bool) -> dict[str, float]:
    """Return the learning rates that --network_args sets, keyed by the argument as typed."""
    rates: dict[str, float] = {}
    # these arguments may have a different meaning for other networks
    if not (network.network_module or RANKED_NETWORKS[0]).startswith(RANKED_NETWORKS):
        return rates
    for key, text in network.arguments().items():
        has_effect = trains_text_encoders or key != "loraplus_text_encoder_lr_ratio"
        if key.startswith("loraplus_") and has_effect:  # a multiple of the transformer's rate
            rates[f"--network_args {key}={text}"] = base * float(text)
        elif key == REG_RATES:
            for pattern, rate in read_rates(REG_RATES, text):
                rates[f"--network_args {REG_RATES} {pattern.pattern}={rate:g}"] = rate
    return rates


def list_run_uses(family: Family, options: TrainingOptions, others: OtherFamilies = NO_OTHERS) -> RunUses:
    """Return what a run uses that a multi-GPU mode (in `runtime/ways`) may not support.

    Args:
        family: The model family.
        options: Options of the run.
        others: Models in addition to the trained one.
    """
    modules: list[str] = []
    for expert in family.experts:
        network = network_for(options, expert)
        if network is not None:
            modules.append(network.network_module or family.lora_module)
    # only one of the two transformers is on the device at a time
    takes_turns = len(family.experts) > 1 and options.by_expert.offload_inactive_dit
    return RunUses(
        turn_taking_options=("--offload_inactive_dit",) if takes_turns else (),
        separate_sample_model="" if others.sampling is None else family.abilities.sampling_dit_option,
        further_models=tuple(options.features.further_models),
        foreign_module=next((module for module in modules if module not in OWN_MODULES), ""),
        own_modules=OWN_MODULES,
    )


def reject_foreign_module(family: Family, options: TrainingOptions) -> None:
    """Raise OptionError if --network_module creates LoRAs for a different model family."""
    module = "" if options.network is None else options.network.network_module or ""
    owner = OWN_MODULES[module].family if module in OWN_MODULES else ""
    if module != family.lora_module and owner not in ("", family.name):
        # its rules name layers of another model, and its files would name another model
        raise OptionError(
            f"--network_module {module} is for a different model than this script trains. Pass "
            f"{family.lora_module}, or omit the option"
        )


def check_networks(family: Family, options: TrainingOptions) -> None:
    """Check the network module, its settings, and the LoRAs that the networks start from."""
    reject_foreign_module(family, options)
    counts = family.block_counts()
    # number of blocks in each block list of the DiT; empty if the file's header does not show it
    depths = dict(zip(family.dit.block_lists, counts, strict=True)) if counts else {}
    for expert, file in zip_longest(family.experts, family.dit_files):
        network = network_for(options, expert)
        if network is None:  # then no expert has a network
            return
        module = network.network_module or family.lora_module
        known_module = OWN_MODULES.get(module)
        has_initial_lora = network.network_weights is not None and known_module is not None
        frozen_options = (options.features.merge, options.frozen.training_adapter)
        with quiet():  # the same warnings are logged when the network is built
            check_network(network, module, depths, family.dit.block_numbering)
            if has_initial_lora or frozen_options != (None, None):
                weighted_loras = _read_loras(family, options, expert, network, has_initial_lora)
                if weighted_loras and file is not None:
                    from networks.apply import check_loras_fit  # only with LoRA files

                    check_loras_fit(file, weighted_loras, family.file_beside(file))


def _read_loras(
    family: Family, options: TrainingOptions, expert: Expert, network: NetworkOptions, has_initial_lora: bool
) -> "list[WeightedLora]":
    """Read all LoRAs of an expert: the merged LoRAs, the LoRA of --network_weights, and the training adapter.

    Raises:
        UserError: If one cannot be used.
    """
    from networks.loading import WeightedLora, read_lora  # only with LoRA files

    merge = options.features.merge
    weighted_loras = [] if merge is None else [*merge(expert).uses]
    if has_initial_lora:
        assert network.network_weights is not None
        initial_lora = read_lora(network.network_weights, with_texts=True)
        _check_kind(initial_lora, network)
        weighted_loras.append(WeightedLora(initial_lora))
    adapter = None
    if options.frozen.training_adapter is not None:
        adapter = read_adapter(options, expert, family.experts)
    if adapter is not None:
        from networks.gated_loras import reject_magnitudes  # only with an adapter

        reject_magnitudes(adapter.lora, TRAINING_ADAPTER)
        weighted_loras.append(adapter)
    return weighted_loras


def _check_kind(lora: "LoraFile", network: NetworkOptions) -> None:
    """Raise OptionError if the --network_weights file and the network are of different kinds, e.g. OFT."""
    # Only kinds that rotate inputs are compared.
    file_kind = find_network_kind(lora.tensors, [kind for kind in KINDS if kind.rotates])
    network_kind = network.kind if network.kind.rotates else None
    if file_kind is network_kind:
        return
    name = f"--network_weights {network.network_weights}"
    if file_kind is not None:
        raise OptionError(
            f"{name} is {named(file_kind)}: to continue training it, pass --network_module "
            f"{file_kind.network_module}"
        )
    assert network_kind is not None
    raise OptionError(
        f"{name} is not {named(network_kind)}, so --network_module {network_kind.network_module} "
        "cannot continue training it. Omit the module, or pass the one that made the file"
    )


def select_lora_format(
    family: Family, lora: NetworkOptions | None, trained_encoders: Sequence[LearningEncoder] = ()
) -> LoraFormat | None:
    """Return the file format of saved LoRAs, which the options choose; None if no LoRA is trained.

    Args:
        family: The model family.
        lora: Options of the LoRA; None if none is trained.
        trained_encoders: Text encoders that are trained; () before they are known.
    """
    if lora is None:
        return None
    module = lora.network_module or family.lora_module
    names = {encoder.lora_prefix: encoder.name for encoder in trained_encoders}
    return select_format(lora, family.name, module, names)


def _find_smallest_file(family: Family, options: TrainingOptions) -> int:
    """Return a lower bound for the size of one saved model in bytes; 0 if it is unknown."""
    network = options.network
    if network is None and trains_checkpoint(family):
        precision = options.saving.save_precision
        return family.checkpoint_bytes(None if precision is None else DTYPES[precision])
    if network is None:
        return sum(_smallest_full_bytes(family, options, file) for file in family.dit_files)
    files = family.dit_files if options.by_expert.lora_per_expert else family.dit_files[:1]
    is_ranked = (network.network_module or family.lora_module).startswith(RANKED_NETWORKS)
    # with these settings, modules may be left out or have other ranks
    if not is_ranked or network.arguments() or network.dim_from_weights:
        return 0
    return sum(smallest_lora_bytes(file, network.rank) for file in files)


def _smallest_full_bytes(family: Family, options: TrainingOptions, file: Path) -> int:
    """Return a lower bound for the bytes on disk of a trained transformer, with its state if that is saved.

    Only weights of blocks are counted, whose names are the same in most files as in the network.

    Args:
        family: The model family.
        options: Options of the run.
        file: File of the transformer that is trained.
    """
    with open_checkpoint(file) as checkpoint:
        tensors = bare_names(checkpoint).tensors
    prefixes = tuple(f"{name}." for name in family.dit.block_lists)
    num_elements = sum(math.prod(info.shape) for name, info in tensors.items() if name.startswith(prefixes))
    # bytes of an element: in training, in the saved model, in the state
    trains_bf16 = options.full_dit is not None and options.full_dit.full_bf16
    training_bytes = 2 if trains_bf16 else 4
    precision = options.saving.save_precision
    file_bytes = training_bytes if precision is None else DTYPES[precision].itemsize
    state_bytes = training_bytes if options.saving.saves_state_at_end else 0
    return num_elements * (file_bytes + state_bytes)


def list_unused_options(
    options: TrainingOptions,
    takes_guidance: bool,
    shifts_table: bool,
    tables: Sequence[DatasetTable] = (),
    family_options: Any = None,
    parts: LearningParts | None = None,
) -> list[str]:
    """Return one line for each given option that has no effect in combination with the others.

    `list_without_effect` finds most of them without the model; this adds options that depend on the model.

    Args:
        options: Options of the run.
        takes_guidance: Whether the model has an input for embedded guidance.
        shifts_table: Whether the model's table of noise levels is shifted by --discrete_flow_shift.
        tables: Tables of the dataset, whose keys may replace options.
        family_options: The model's own options.
        parts: Parts of a full checkpoint that are trained.
    """
    shifts_table = shifts_table and options.timesteps.timestep_sampling == "sigma"
    reasons = explain_ignored_options(options.timesteps, tables, validates_between=options.is_for_images)
    if not options.is_for_images:  # image trainers have defaults for both options
        if options.timesteps.timestep_sampling != "shift" and not shifts_table:
            reasons["discrete_flow_shift"] = "only --timestep_sampling shift uses it"
        if not takes_guidance:
            reasons["guidance_scale"] = "this model has no input for embedded guidance"
    if parts is not None and parts.have_own_rates:
        reasons["learning_rate"] = "all trained parts have their own rates"
    return list_without_effect(options, family_options, reasons)


def describe_learning_rate(options: TrainingOptions, network_spec: NetworkSpec) -> str:
    """Describe the learning rate, and add the usual one if it is far off.

    Args:
        options: Options of the run.
        network_spec: What the run trains.
    """
    optimizer = options.optimizer
    parts = options.lora_parts
    usual_rates, label = LORA_RATE, "a LoRA"
    if network_spec.custom is not None:
        usual_rates, label = network_spec.custom.default_rate, network_spec.custom.label
    elif options.network is None:
        usual_rates, label = FULL_RATE, "a whole model"
    rate = optimizer.learning_rate if parts is None or parts.unet_lr is None else parts.unet_lr
    text = f"{rate:g}"
    name = (optimizer.optimizer_type or "AdamW").rpartition(".")[2].lower()
    finds_rate_itself = name.startswith(FIND_RATE) and optimizer.arguments().get("relative_step") is not False
    # the default rates are for Adam; full models are often trained with Adafactor and a fixed rate
    is_comparable = "adam" in name or (options.network is None and name == "adafactor")
    if not is_comparable or finds_rate_itself or usual_rates.low <= rate <= usual_rates.high:
        return text
    level = "LOW" if rate < usual_rates.low else "HIGH"
    return f"{text}, which is {level} for {label}: {usual_rates.default} is usual"
