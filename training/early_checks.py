"""Check a run's options and file headers before gigabytes are loaded."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from torch.nn import Parameter

from blissful_tuner.latent_preview import check_preview
from modules.atomic_write import check_space
from modules.contract.family import Family
from modules.contract.rules import Expert
from modules.errors import OptionError
from modules.offload.swap_plan import check_swap
from modules.planning.dry_run import quiet
from networks.adapter import check_network
from networks.added import refuse_dora
from networks.apply import check_loras_fit
from networks.loading import LoraUse, read_lora
from networks.lora_settings import DEFAULT_RANK
from networks.options import NetworkOptions
from networks.own_modules import OWN_MODULES, smallest_lora_bytes
from training.experts import check_experts, network_for, read_lora_for
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer
from training.options import RANKED_NETWORKS, TrainingOptions
from training.samples import read_requests


def check_before_loading(
    family: Family, options: TrainingOptions, total_steps: int, sampling: Family | None = None
) -> None:
    """Raise UserError for a run that is impossible.

    The optimizer and its schedule are made once for a stand-in of a weight. total_steps: of the whole run.
    sampling: the model of samples, if it is another one.
    """
    family.check_given_files()
    if sampling is not None:
        sampling.check_given_files()
    check_experts(family, options)
    counts = family.block_counts()
    swap = options.speed.swap
    if counts and isinstance(swap.blocks_to_swap, int):
        check_swap(family.dit, swap.number, counts)
    with quiet():
        stand_in: Mapping[str, object] = {
            "params": [Parameter(torch.zeros(2, 2))],
            "lr": options.optimizer.learning_rate,
        }
        optimizer, _ = make_optimizer(options.optimizer, [stand_in])
        make_lr_schedule(options.lr_schedule, optimizer, total_steps)
    _check_networks(family, options)
    _check_samples(sampling or family, options)
    _check_room(family, options)


def _check_networks(family: Family, options: TrainingOptions) -> None:
    """Check the module, its settings, and the LoRAs that the networks start from."""
    counts = family.block_counts()
    depths = dict(zip(family.dit.block_lists, counts, strict=True)) if counts else {}
    for expert, file in zip_longest(family.experts, family.dit_files):
        network = network_for(options, expert)
        if network is None:
            return
        module = network.network_module or family.lora_module
        own = OWN_MODULES.get(module)
        if own is not None and own.rules is not None and module != family.lora_module:
            # its rules name layers of another model: only those that happen to be called the same would learn
            raise OptionError(
                f"--network_module {module} is for another model than this script trains. Give "
                f"{family.lora_module}, or leave the option out"
            )
        files = zip(network.base_weights or (), network.base_multipliers(), strict=True)
        with quiet():  # all warnings come again when it is made
            check_network(network, module, depths)
            uses = [_use(path, expert, multiplier) for path, multiplier in files]
            if network.network_weights is not None and own is not None:
                uses.append(LoraUse(read_lora(network.network_weights, with_texts=True)))
            if file is not None:
                check_loras_fit(file, uses)


def _use(path: Path, expert: Expert, multiplier: float) -> LoraUse:
    """Read a LoRA, of a file for several experts that for this one."""
    return LoraUse(read_lora_for(path, expert), multiplier)


def _check_samples(family: Family, options: TrainingOptions) -> None:
    """Check the prompts of samples, the LoRAs that only they have, and the needs of their previews."""
    samples = options.samples
    check_preview(samples.preview, family.latent)
    with quiet():
        if samples.sample_prompts is not None and (samples.is_timed or samples.sample_now):
            read_requests(family, samples.sample_prompts)
        for expert, file in zip_longest(family.experts, family.dit_files):
            uses = [_use(path, expert, multiplier) for path, multiplier in samples.loras()]
            for use in uses:
                refuse_dora(use.lora)
            if file is not None:
                check_loras_fit(file, uses)


def _check_room(family: Family, options: TrainingOptions) -> None:
    """Raise OutputError if the disk has no room for one trained file."""
    folder, name = options.saving.output_dir, options.saving.output_name
    if folder is None or name is None or not folder.is_dir():
        return
    size = 0
    if options.whole_dit is not None:
        # half: a file in float32 may be saved in 16 bits
        size = sum(file.stat().st_size for file in family.dit_files if file.is_file()) // 2
    elif options.network is not None and _grows_with_rank(family, options.network):
        rank = options.network.network_dim or DEFAULT_RANK
        files = family.dit_files if options.by_expert.lora_per_expert else family.dit_files[:1]
        size = sum(smallest_lora_bytes(file, rank) for file in files)
    check_space(Path(folder) / f"{name}.safetensors", size)


def _grows_with_rank(family: Family, options: NetworkOptions) -> bool:
    """Return whether a network has at least two factors of --network_dim for each module."""
    module = options.network_module or family.lora_module
    takes_all = not options.arguments() and not options.dim_from_weights
    return takes_all and module.startswith(RANKED_NETWORKS)
