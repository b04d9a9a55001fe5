"""Load the networks of a plan, make the trained part with its optimizer, and put the run together."""

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modules.contract.data import CAPTION
from modules.contract.family import Family, hears_sound
from modules.contract.rules import Expert
from modules.devices import dtype_of, gib, keep_heap_small, warn_if_emulated
from modules.dressing import share_tokens, shared_blocks, swapped_weights
from modules.errors import MemoryPlanError
from modules.installation import import_own
from modules.offload.turns import HostCopy
from modules.planning.device_memory import MemoryWatch, bytes_on, spare_bytes
from modules.speed_options import SwapOptions
from networks.adapter import make_network
from training import experts
from training.data.feed import Feed, Randomness
from training.loss import LossRule
from training.optimizers import stepping
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import check_rates, find_averaging, make_optimizer
from training.plan import TrainingPlan
from training.reports.logs import Logs
from training.reports.reporter import RunReporter
from training.saver import restore
from training.saving.files import MinuteClock, Saver
from training.saving.states import SavedState
from training.trainable import (
    Rates,
    Trainable,
    refuse_quantised_bases,
    share_network,
    train_apart,
    train_dit,
    train_network,
)
from training.training_run import Requests, TrainedModel, TrainingRun, trigger_paths
from training.validation import Validation

if TYPE_CHECKING:  # loaded only if there are LoRA files; if there are prompts
    from networks.added import AddedLoras
    from networks.apply import LoraPatch
    from training.averages import WeightAverage
    from training.samples import Sampler

logger = logging.getLogger(__name__)


def load_model(plan: TrainingPlan, swap: SwapOptions, has_samples: bool) -> TrainedModel:
    """Load the networks, add the trained part, dress them, and restore the state of --resume.

    swap: the plan's, with auto resolved. The text encoders that stay are loaded already; those that learn get
    a part of the network.
    """
    options, family, accelerator = plan.options, plan.family, plan.accelerator
    samples_with_others = has_samples and plan.sampled is not family
    takes_turns = len(family.experts) > 1 and options.by_expert.offload_inactive_dit
    loading = Loading(plan, swap, has_samples, takes_turns or samples_with_others)
    networks, learners = list[nn.Module](), tuple[Trainable, ...]()
    for index in range(len(family.experts)):
        dit, learners = loading.load(family, index, learners)
        networks.append(dit)
    dits = sample_dits = experts.ExpertNetworks(networks, loading.copies)
    if samples_with_others:  # networks beside those that are trained
        known = dict(zip(family.dit_files, networks, strict=True))
        # in place of all that are trained: what learns is in them too
        in_place = not known.keys() & set(plan.sampled.dit_files)
        sampled = []
        for index, file in enumerate(plan.sampled.dit_files):
            if file not in known:
                known[file], given = loading.load(plan.sampled, index, learners if in_place else None)
                learners = given if in_place else learners
            sampled.append(known[file].eval())
        sample_dits = experts.ExpertNetworks(sampled, loading.copies)
    if len(learners) == 1:
        trainable = learners[0]
    else:
        names = [expert.name for expert in family.experts]
        trainable = train_apart(dict(zip(names, learners, strict=True)))
    rates = zip(trainable.group_names, (group["lr"] for group in trainable.groups), strict=True)
    check_rates(options.optimizer, {f"the learning rate of {name}": rate for name, rate in rates})
    optimizer, optimizer_name = make_optimizer(options.optimizer, trainable.groups)
    schedule = make_lr_schedule(options.lr_schedule, optimizer, plan.steps.total_steps)
    if (averaging := find_averaging(optimizer)) is not None:
        averaging.train()
    scaler = accelerator.scaler or torch.amp.GradScaler(accelerator.device.type, enabled=False)
    average: WeightAverage | None = None
    if options.average.ema_decay is not None:
        keeps = accelerator.is_main_process or plan.splits_model
        make = import_own("training.averages").make_average
        average = make(options.average, networks, trainable, optimizer, keeps)
    model = TrainedModel(
        plan=plan,
        dits=dits,
        sample_dits=sample_dits,
        sample_loras=loading.sample_loras,
        adapters=loading.adapters,
        trainable=trainable,
        optimizer=optimizer,
        optimizer_name=optimizer_name,
        schedule=schedule,
        scaler=scaler,
        stepping=_make_stepping(plan, trainable, optimizer, scaler),
        average=average,
    )
    for adapter in model.adapters:
        adapter.place_on(accelerator.device, model.compute_dtype)
    restore(model)
    return model


def make_run(
    model: TrainedModel,
    sampler: "Sampler | None",
    memory: MemoryWatch | None,
    logs: Logs,
    reporter: RunReporter,
    saver: Saver | None,
) -> TrainingRun:
    plan, options, accelerator = model.plan, model.plan.options, model.plan.accelerator
    preserves = any(table.preserves_output for table in plan.config.datasets)
    in_lockstep, trainable = plan.steps.in_lockstep and preserves, model.trainable
    as_base = trainable.as_base if trainable.networks else None
    rule = LossRule(options.loss, options.predicted, as_base, always_as_base=in_lockstep)
    randomness = Randomness(
        options.timesteps,
        plan.progress.seed,
        plan.family.noise,
        tuple(plan.family.experts),
        options.noise,
        options.weighted_by,
        plan.family.sound_learning if hears_sound(plan.family) else None,
    )
    feed = Feed(
        plan.order,
        plan.family.latent,
        randomness,
        plan.commands,
        plan.steps,
        accelerator.process_index // plan.steps.peers,
        options.loop.max_data_loader_n_workers,
        accelerator.device.type == "cuda",
        plan.sources,
        reads_dropped=options.frozen.teacher is not None and CAPTION in plan.family.fuller,
        encoders=plan.encoders,
    )
    minutes = plan.saving.save_every_n_minutes
    watched = trigger_paths(plan.names, options.samples.sample_now) if accelerator.is_main_process else {}
    return TrainingRun(
        model=model,
        feed=feed,
        rule=replace(rule, teacher_weight=options.frozen.teacher_weight) if options.frozen.teacher else rule,
        validation=Validation(plan, rule) if plan.validation else None,
        sampler=sampler,
        memory=memory,
        logs=logs,
        reporter=reporter,
        requests=Requests(watched, sampler is not None),
        clock=None if minutes is None or not accelerator.is_main_process else MinuteClock(minutes),
        saver=saver,
    )


@dataclass
class Loading:
    """Loads networks one after the other. Those that take turns wait in host memory from the beginning."""

    plan: TrainingPlan
    swap: SwapOptions  # auto is resolved
    has_samples: bool
    takes_turns: bool  # one network is on the device at a time
    sample_loras: "list[AddedLoras]" = field(default_factory=list)
    adapters: "list[AddedLoras]" = field(default_factory=list)  # in networks that are trained
    copies: dict[nn.Module, HostCopy] = field(default_factory=dict)  # of networks that take turns

    def load(
        self, family: Family, index: int, learners: tuple[Trainable, ...] | None = None
    ) -> tuple[nn.Module, tuple[Trainable, ...]]:
        """Load the network of an expert, frozen, merging --base_weights while loading, and dress it.

        A network to train gets the training dtype. learners: the trained parts of the networks before; None:
        the network is for samples only. Returns the network, and all trained parts so far. Raises
        MemoryPlanError if the device has no room for the next network.
        """
        plan, options, device = self.plan, self.plan.options, self.plan.accelerator.device
        expert, sharding = family.experts[index], options.speed.sharding
        host = swapped_weights(family.dit, self.swap, device, whole=self.takes_turns)
        shares = shared_blocks(sharding, device)
        network = experts.network_for(options, expert)
        files = zip(network.base_weights or (), network.base_multipliers(), strict=True) if network else ()
        merged = [experts.read_use(path, expert, multiplier) for path, multiplier in files]
        patch: LoraPatch | None = import_own("networks.apply").LoraPatch(merged) if merged else None
        placement = experts.placement_of(options, device, plan.quantisation)
        # a DoRA learns the norms of the weights, which include merged LoRAs
        beside = None if patch is None or (network and network.decomposes) else patch.leave_beside
        placement = replace(placement, patch=patch, beside=beside, host=host, blocks=shares)
        if options.network is None:
            refuse_quantised_bases(family.dit_files[index : index + 1])
        dit = family.load_dit(placement, index)
        experts.check_dtype(family, options, dtype_of(dit))
        computed = experts.AUTOCAST.get(options.accelerator.mixed_precision) or dtype_of(dit)
        if patch is not None:
            patch.check()
        if patch is not None and patch.beside:
            import_own("networks.beside").add_beside(dit, patch.beside, device, computed)
        del merged, patch  # tensors of files: what follows fills the host's memory
        warn_if_emulated(device, computed, "the transformer")
        dit.requires_grad_(False)
        if shares is not None and plan.splits_model:
            shares.split(dit)
        if learners is not None:
            learners = _add_learner(plan, dit, expert, learners)
        is_compiled = options.speed.compilation.choice is not None
        given = experts.read_adapter(options, expert, family.experts) if family is plan.family else None
        if given is not None:
            self.adapters.append(
                import_own("networks.added").add_loras(dit, [given], is_compiled, experts.TRAINING_ADAPTER)
            )
        if self.has_samples and (found := options.samples.loras()):
            extra = [experts.read_use(path, expert, multiplier) for path, multiplier in found]
            self.sample_loras.append(import_own("networks.added").add_loras(dit, extra, is_compiled))
        if self.has_samples and "stage_files" in vars(dit):
            import_own("networks.added").add_stage_loras(dit, is_compiled)
        experts.dress(dit, family.dit, options.loop, device, options.speed.compilation.choice, host, shares)
        if sharding.context_parallel > 1:
            share_tokens(dit, sharding, device)
        if plan.quantisation is not None and device.type == "cpu":
            keep_heap_small()  # else temporary whole weights fragment the heap
        if self.takes_turns:
            self.copies[dit] = HostCopy(dit, device, host)
        elif index + 1 < len(family.experts) and device.type == "cuda":
            _require_room(bytes_on(dit, device), spare_bytes(device))
        return dit, learners or ()


def _require_room(size: int, room: int) -> None:
    if size > room:
        raise MemoryPlanError(
            f"both transformers do not fit on the device: one takes {gib(size)} GiB, {gib(room)} GiB are "
            "left beside it. Use --offload_inactive_dit, so that they take turns, or --blocks_to_swap"
        )


def _add_learner(
    plan: TrainingPlan, dit: nn.Module, expert: Expert, learners: tuple[Trainable, ...]
) -> tuple[Trainable, ...]:
    """Put the network into a DiT, or choose the trained parameters of the DiT itself.

    learners: the trained parts of the DiTs before; if there is a network, this DiT shares it, unless each
    expert has its own (--lora_per_expert). Returns all trained parts so far.
    """
    options, device = plan.options, plan.accelerator.device
    if options.network is None:
        assert options.whole_dit is not None  # one of the two is given
        train = train_dit
        if plan.splits_model:
            from training.saving.split_model import train_split_dit as train
        return (*learners, train(dit, options.optimizer.learning_rate, options.whole_dit.name_parts))
    given = experts.network_for(options, expert) or options.network
    texts, saved = plan.texts, dict[str, Tensor]()
    if isinstance(plan.saved, SavedState):
        part = f"{expert.name}_network" if options.by_expert.lora_per_expert else "network"
        saved = {**plan.saved.parts.get(part, {})}
    elif plan.saved is not None:
        saved = {**plan.saved.network}
    in_dit = options.parts is None or options.parts.trains_dit
    network = make_network(
        given,
        plan.family.lora_module,
        dit,
        plan.progress.seed,
        {} if texts is None else texts.networks,
        in_dit,
        saved,
    )
    if learners and not options.by_expert.lora_per_expert:
        return (share_network(learners[0], network, device),)
    rate, parts = options.optimizer.learning_rate, options.parts
    rates: Rates = (rate, None if parts is None else parts.unet_lr, None)
    if parts is not None:
        of_texts = None
        if texts is not None and texts.learning:
            found = dict(zip(texts.able, parts.text_rates(len(texts.able), rate), strict=True))
            of_texts = [found[each.lora_prefix] for each in texts.learning]
        rates = (rate, parts.unet_lr, of_texts)
    return (*learners, train_network(network, rates, given.scale_weight_norms, device, plan.lora_format))


def _make_stepping(
    plan: TrainingPlan, trainable: Trainable, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> stepping.StepAfterBackward | stepping.FusedBackward:
    """Return how weights are stepped: all at once, one by one, or inside the backward pass."""
    options, max_norm, parameters = plan.options, plan.options.optimizer.max_grad_norm, trainable.parameters
    alone, kind = None, type(optimizer)
    gathers = bool(trainable.split) and not stepping.steps_numbers(kind)
    if options.is_fused or gathers or (options.whole_dit is not None and options.whole_dit.full_bf16):
        if stepping.steps_alone(kind):
            alone = stepping.ParameterSteps(optimizer, trainable.names, plan.progress, trainable.split)
        else:
            logger.warning(
                "--full_bf16: this optimizer's steps are rounded to the nearest bf16, which loses small ones."
            )
    if alone is None or not options.is_fused:
        networks, split = trainable.all_networks, trainable.split
        return stepping.StepAfterBackward(optimizer, parameters, max_norm, scaler, networks, alone, split)
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass clips the gradient of each weight by itself to --max_grad_norm "
            f"{max_norm}."
        )
    return stepping.FusedBackward(alone, parameters, max_norm)
