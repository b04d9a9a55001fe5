"""Load the DiT and make what learns: a network in it or the DiT itself, with optimizer and schedule."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from modules.attention.attend import check_backend
from modules.contract.experts import Expert
from modules.contract.family import Family
from modules.contract.loading import HostPlace
from modules.devices import dtype_name
from modules.dressing import swapped_weights
from modules.errors import MemoryPlanError, OptionError
from modules.offload.host_memory import machine_of
from modules.offload.turns import HostCopy, HostPlaceOf
from modules.planning.device_memory import bytes_on, spare_bytes
from modules.planning.memory_plan import gib
from networks.adapter import make_network
from networks.added import AddedFile, AddedLoras, add_loras
from networks.merge import LoraPatch, LoraUse
from training.averages import make_average
from training.changes import OptionChange, rebuild_schedule
from training.data.live_text import LiveTexts
from training.dressing import AUTOCAST, dress, dtype_of, placement_of
from training.experts import ExpertNetworks, Turns, network_for, read_lora_for
from training.job import TrainingJob
from training.optimizers.fused_backward import FusedBackward
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer, set_training
from training.optimizers.parameter_steps import ParameterSteps, steps_alone
from training.options import TrainingOptions
from training.resuming import Learning, restore
from training.trainable import Rates, Trainable, share_network, train_apart, train_dit, train_network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Hold the networks with all that changes them."""

    dits: ExpertNetworks
    learning: Learning
    optimizer_name: str  # for metadata
    steps: ParameterSteps | None  # if weights are stepped one by one
    fused: FusedBackward | None  # if that happens inside the backward pass
    sample_loras: Sequence[AddedLoras]  # switched on for samples
    sample_dits: ExpertNetworks | None  # if samples are made with more than what is trained


def load_model(
    job: TrainingJob,
    total_steps: int,
    changes: Sequence[OptionChange],
    has_samples: bool,
    texts: LiveTexts | None = None,
) -> LoadedModel:
    """Load the networks, put into them what learns, dress them, and restore what --resume names.

    changes: what --resume_changed changes. has_samples: whether --sample_lora and other networks are of use.
    texts: loaded text encoders; those that learn get a part of the network.
    """
    loading = Loading(job, has_samples)
    learners: list[Trainable] = []

    def attach(dit: nn.Module, expert: Expert) -> None:
        _add_learner(job, dit, expert, learners, texts)

    networks = [loading.load(job.family, index, attach) for index in range(len(job.family.experts))]
    if len(learners) == 1:
        trainable = learners[0]
    else:
        names = [expert.name for expert in job.family.experts]
        trainable = train_apart(dict(zip(names, learners, strict=True)))
    sampled = loading.load_sampled(networks)
    dits = ExpertNetworks(networks, loading.turns)
    learning, optimizer_name = _make_learning(job, networks, trainable, total_steps)
    if job.saved is not None:
        restore(job.saved, learning, bool(changes))
    elif job.progress.step:  # begun later
        rebuild_schedule(learning.schedule, job.progress.step)
    steps = _make_steps(job, learning)
    return LoadedModel(dits, learning, optimizer_name, *steps, loading.sample_loras, sampled)


@dataclass
class Loading:
    """Loads networks one after the other. Those that take turns wait in host memory from the beginning."""

    job: TrainingJob
    has_samples: bool
    sample_loras: list[AddedLoras] = field(default_factory=list)
    _copies: dict[nn.Module, HostCopy] = field(default_factory=dict)

    @property
    def samples_with_others(self) -> bool:
        """Return whether samples are made with networks that are not trained."""
        return self.has_samples and self.job.sampling is not None

    @property
    def takes_turns(self) -> bool:
        """Return whether only one network is on the device at a time."""
        is_asked = len(self.job.family.experts) > 1 and self.job.options.by_expert.offload_inactive_dit
        return is_asked or self.samples_with_others

    @property
    def turns(self) -> Turns | None:
        return Turns(self._copies) if self.takes_turns else None

    def load(self, family: Family, index: int, attach: Callable[[nn.Module, Expert], None]) -> nn.Module:
        """Load and dress the network of an expert. attach: puts what learns into it."""
        options, device, expert = self.job.options, self.job.accelerator.device, family.experts[index]
        host = swapped_weights(family.dit, options.speed.swap, device)
        place = HostPlaceOf(device, host, machine_of(os.environ)) if self.takes_turns else None
        dit = _load_dit(self.job, family, index, place or host)
        attach(dit, expert)
        is_compiled = options.speed.compilation.choice is not None
        if self.has_samples and options.samples.loras():
            extra = [
                AddedFile(read_lora_for(path, expert), multiplier)
                for path, multiplier in options.samples.loras()
            ]
            self.sample_loras.append(add_loras(dit, extra, is_compiled))
        dress(dit, family.dit, options.loop, device, options.speed.compilation.choice, host)
        if place is not None:
            self._copies[dit] = HostCopy(dit, device, place)
        elif index + 1 < len(family.experts):
            _require_room(dit, device)
        return dit

    def load_sampled(self, trained: Sequence[nn.Module]) -> ExpertNetworks | None:
        """Load the networks that only samples need, beside those that are trained; None if there are none."""
        if not self.samples_with_others or self.job.sampling is None:
            return None
        sampling = self.job.sampling
        known = dict(zip(self.job.family.dit_files, trained, strict=True))
        networks = [
            known[file] if file in known else self.load(sampling, index, lambda *_: None).eval()
            for index, file in enumerate(sampling.dit_files)
        ]
        return ExpertNetworks(networks, self.turns)


def _require_room(dit: nn.Module, device: torch.device) -> None:
    """Raise MemoryPlanError if the device has no room for another network like this one."""
    if device.type != "cuda":
        return
    size, room = bytes_on(dit, device), spare_bytes(device)
    if size > room:
        raise MemoryPlanError(
            f"both transformers do not fit on the device: one takes {gib(size)} GiB, {gib(room)} GiB are "
            "left beside it. Use --offload_inactive_dit, so that they take turns, or --blocks_to_swap"
        )


def check_computing(job: TrainingJob) -> None:
    """Raise OptionError if the requested attention or precision is not available; nothing is loaded yet."""
    autocast = AUTOCAST.get(job.options.accelerator.mixed_precision)
    placement = placement_of(job.options, job.accelerator.device, job.fp8)
    check_backend(
        placement.attention,
        placement.device,
        lambda: autocast or job.family.compute_dtype(placement),
        training=True,
    )
    if autocast is not None:
        _check_dtype(job, job.family.compute_dtype(placement))


def _load_dit(job: TrainingJob, family: Family, index: int, host: HostPlace | None) -> nn.Module:
    """Load the network of an expert, frozen, merging --base_weights while loading.

    One that is to be trained gets the training dtype. host: keeps weights in host memory.
    """
    expert = family.experts[index]
    network = network_for(job.options, expert)
    files = (
        [] if network is None else zip(network.base_weights or (), network.base_multipliers(), strict=True)
    )
    uses = [LoraUse(read_lora_for(path, expert), multiplier) for path, multiplier in files]
    patch = LoraPatch(uses) if uses else None
    placement = placement_of(job.options, job.accelerator.device, job.fp8)
    dit = family.load_dit(replace(placement, patch=patch, host=host), index)
    if patch is not None:
        patch.check()
    _check_dtype(job, dtype_of(dit))
    return dit.requires_grad_(False)


def _check_dtype(job: TrainingJob, dtype: torch.dtype) -> None:
    """Raise OptionError if --mixed_precision does not go with the dtype that the model computes in."""
    precision = job.options.accelerator.mixed_precision
    autocast = AUTOCAST.get(precision)
    if autocast is None or dtype in {autocast, torch.float32}:
        return
    casts = f", or --dit_dtype {precision}" if hasattr(job.family.options, "dit_dtype") else ""
    raise OptionError(
        f"--mixed_precision {precision}: the model is {dtype_name(dtype)}. Use --mixed_precision no, or the "
        f"model's dtype{casts}."
    )


def _add_learner(
    job: TrainingJob,
    dit: nn.Module,
    expert: Expert,
    learners: list[Trainable],
    texts: LiveTexts | None,
) -> None:
    """Put the network into a DiT, or choose what of the DiT itself learns.

    learners: of the DiTs before this one; a network that is there already is shared, unless each expert has
    its own (--lora_per_expert).
    """
    options, device = job.options, job.accelerator.device
    if options.network is None:
        assert options.whole_dit is not None  # one of the two is there
        learners.append(train_dit(dit, options.optimizer.learning_rate, options.whole_dit.name_parts))
        return
    given = network_for(options, expert) or options.network
    encoders = {} if texts is None else texts.networks
    in_dit = options.parts is None or options.parts.trains_dit
    network = make_network(given, job.family.lora_module, dit, job.progress.seed, encoders, in_dit)
    if learners and not options.by_expert.lora_per_expert:
        learners[0] = share_network(learners[0], network, device)
        return
    rates = _rates(options, texts)
    learners.append(train_network(network, rates, given.scale_weight_norms, device))


def _rates(options: TrainingOptions, texts: LiveTexts | None) -> Rates:
    """Return the learning rates of the network's parts."""
    rate, parts = options.optimizer.learning_rate, options.parts
    if parts is None or texts is None:
        return Rates(rate, None if parts is None else parts.unet_lr)
    given = dict(zip(texts.able, parts.text_rates(len(texts.able), rate), strict=True))
    return Rates(rate, parts.unet_lr, [given[encoder.lora_prefix] for encoder in texts.learning] or None)


def _make_learning(
    job: TrainingJob, dits: Sequence[nn.Module], trainable: Trainable, steps: int
) -> tuple[Learning, str]:
    """Make optimizer and schedule. Also returns the optimizer's name for metadata."""
    options, device = job.options, job.accelerator.device
    optimizer, name = make_optimizer(options.optimizer, trainable.groups)
    schedule = make_lr_schedule(options.lr_schedule, optimizer, steps)
    set_training(optimizer, True)
    average = make_average(options.average, dits, trainable, optimizer, job.accelerator.is_main_process)
    return Learning(trainable, optimizer, schedule, device, job.accelerator.scaler, average), name


def _make_steps(job: TrainingJob, learning: Learning) -> tuple[ParameterSteps | None, FusedBackward | None]:
    """Return what steps single weights and what does so in the backward pass, if the options ask for it."""
    options, trainable, optimizer = job.options, learning.trainable, learning.optimizer
    in_bf16 = options.whole_dit is not None and options.whole_dit.full_bf16
    if not (in_bf16 or options.is_fused):
        return None, None
    if not steps_alone(type(optimizer)):
        logger.warning(
            "--full_bf16: this optimizer's steps are rounded to the nearest bf16, which loses small ones."
        )
        return None, None
    steps = ParameterSteps(optimizer, trainable.names, job.progress)
    if not options.is_fused:
        return steps, None
    max_norm = job.options.optimizer.max_grad_norm
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass clips the gradient of each weight by itself to --max_grad_norm "
            f"{max_norm}."
        )
    return steps, FusedBackward(steps, trainable.parameters, max_norm)
