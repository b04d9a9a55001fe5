"""Load the DiT and make what learns: a network in it or the DiT itself, with optimizer and schedule."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from modules.attention.attend import check_backend
from modules.devices import dtype_name
from modules.dressing import swapped_weights
from modules.errors import OptionError
from modules.offload.block_swap import HostWeights
from networks.adapter import make_network
from networks.added import AddedFile, AddedLoras, add_loras
from networks.loading import read_lora
from networks.merge import LoraPatch, LoraUse
from training.averages import make_average
from training.changes import Change
from training.dressing import AUTOCAST, dress, dtype_of, placement_of
from training.job import TrainingJob
from training.optimizers.fused_backward import FusedBackward
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer, set_training
from training.optimizers.parameter_steps import ParameterSteps, steps_alone
from training.resuming import Learning, restore
from training.trainable import Trainable, train_dit, train_network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Hold the DiT with all that changes it."""

    dit: nn.Module
    learning: Learning
    optimizer_name: str  # for metadata
    steps: ParameterSteps | None  # if weights are stepped one by one
    fused: FusedBackward | None  # if that happens inside the backward pass
    sample_loras: AddedLoras | None  # switched on for samples


def load_model(
    job: TrainingJob, total_steps: int, changes: Sequence[Change], has_samples: bool
) -> LoadedModel:
    """Load the DiT, put the network into it, dress it, and restore what --resume names.

    changes: what --resume_changed changes. has_samples: whether --sample_lora is of use.
    """
    options, device = job.options, job.accelerator.device
    host = swapped_weights(job.family.dit, options.speed.swap, device)
    dit = _load_dit(job, host)
    trainable = _make_trainable(job, dit)
    extra = [AddedFile(read_lora(path), multiplier) for path, multiplier in options.samples.loras()]
    is_compiled = options.speed.compilation.choice is not None
    sample_loras = add_loras(dit, extra, is_compiled) if has_samples and extra else None
    learning, optimizer_name = _make_learning(job, dit, trainable, host, total_steps)
    if job.saved is not None:
        restore(job.saved, learning, bool(changes))
    return LoadedModel(dit, learning, optimizer_name, *_make_steps(job, learning), sample_loras)


def check_attention(job: TrainingJob) -> None:
    """Raise OptionError if the requested attention is not available; nothing is loaded yet."""
    autocast = AUTOCAST.get(job.options.accelerator.mixed_precision)
    placement = placement_of(job.options, job.accelerator.device, job.fp8)
    check_backend(
        placement.attention,
        placement.device,
        lambda: autocast or job.family.compute_dtype(placement),
        training=True,
    )


def _load_dit(job: TrainingJob, host: HostWeights | None) -> nn.Module:
    """Load the DiT onto the device, frozen, merging --base_weights while loading.

    A DiT that is to be trained gets the training dtype. host: keeps the weights of swapped blocks.
    """
    network, precision = job.options.network, job.options.accelerator.mixed_precision
    files = (
        [] if network is None else zip(network.base_weights or (), network.base_multipliers(), strict=True)
    )
    uses = [LoraUse(read_lora(path), multiplier) for path, multiplier in files]
    patch = LoraPatch(uses) if uses else None
    placement = placement_of(job.options, job.accelerator.device, job.fp8)
    dit = job.family.load_dit(replace(placement, patch=patch, host=host))
    if patch is not None:
        patch.check()
    dtype, autocast = dtype_of(dit), AUTOCAST.get(precision)
    if autocast is not None and dtype not in {autocast, torch.float32}:
        raise OptionError(
            f"--mixed_precision {precision}: the model is {dtype_name(dtype)}. Use --mixed_precision no, or "
            "the model's dtype."
        )
    return dit.requires_grad_(False)


def _make_trainable(job: TrainingJob, dit: nn.Module) -> Trainable:
    """Put the network into the DiT, or choose what of the DiT itself learns."""
    options = job.options
    if options.network is None:
        assert options.whole_dit is not None  # one of the two is there
        return train_dit(dit, options.optimizer.learning_rate, options.whole_dit.name_parts)
    network = make_network(options.network, job.family.lora_module, dit, job.progress.seed)
    max_norm = options.network.scale_weight_norms
    return train_network(network, options.optimizer.learning_rate, max_norm, job.accelerator.device)


def _make_learning(
    job: TrainingJob, dit: nn.Module, trainable: Trainable, host: HostWeights | None, steps: int
) -> tuple[Learning, str]:
    """Dress the DiT (compiling, checkpointing, swap) and make optimizer and schedule.

    Also returns the optimizer's name for metadata.
    """
    options, device = job.options, job.accelerator.device
    dress(dit, job.family.dit, options.loop, device, options.speed.compilation.choice, host)
    optimizer, name = make_optimizer(options.optimizer, trainable.groups)
    schedule = make_lr_schedule(options.lr_schedule, optimizer, steps)
    set_training(optimizer, True)
    whole = options.whole_dit
    in_float32 = (
        whole is not None and (whole.full_bf16 or whole.fused_backward_pass) and steps_alone(type(optimizer))
    )
    average = make_average(options.average, dit, trainable, optimizer, job.accelerator.is_main_process)
    return Learning(trainable, optimizer, schedule, device, job.accelerator.scaler, in_float32, average), name


def _make_steps(job: TrainingJob, learning: Learning) -> tuple[ParameterSteps | None, FusedBackward | None]:
    """Return what steps single weights and what does so in the backward pass, if the options ask for it."""
    whole, trainable, optimizer = job.options.whole_dit, learning.trainable, learning.optimizer
    if whole is None or not (whole.full_bf16 or whole.fused_backward_pass):
        return None, None
    if not steps_alone(type(optimizer)):
        logger.warning(
            "--full_bf16: this optimizer's steps are rounded to the nearest bf16, which loses small ones."
        )
        return None, None
    steps = ParameterSteps(optimizer, trainable.names, job.progress)
    if not whole.fused_backward_pass:
        return steps, None
    max_norm = job.options.optimizer.max_grad_norm
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass clips the gradient of each weight by itself to --max_grad_norm "
            f"{max_norm}."
        )
    return steps, FusedBackward(steps, trainable.parameters, max_norm)
