"""Load the networks of a plan, make the trained part with its optimizer, and put the run together."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from checkpoints.opening import open_checkpoint
from checkpoints.shards import SavedForm
from modules.devices import format_gib, get_compute_dtype, keep_heap_small, warn_if_emulated
from modules.errors import MemoryPlanError
from networks.options import NetworkOptions
from protocols.bundled_embeddings import get_embedding_word
from protocols.data import CAPTION
from protocols.family import Family, get_part_rates, trains_audio
from protocols.loading import BlockSharder
from protocols.rules import Expert
from runtime.network_setup import make_host_weights
from runtime.offload.swap_plan import HostWeights
from runtime.offload.turns import HostCopy
from runtime.options import SwapOptions
from runtime.planning.device_memory import MemoryWatch, bytes_on, spare_bytes
from runtime.run_blocks import get_stage_files
from runtime.ways.composing import finish_network, make_block_sharder
from training import experts
from training.data.feed import Feed, NoiseSampler
from training.features.contract import BASE_MODEL, DROPPED_CAPTIONS, EMPTY_PROMPT, REJECTED_ONES
from training.features.hooks import AuxiliaryLearner, MergedLoras
from training.features.loss_phases import add_phases
from training.features.phases import VALIDATION_TARGETS
from training.learning_options import PartsOptions
from training.loop import make_phases
from training.loss import LossRule
from training.optimizers import stepping
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import (
    arrange_weights,
    check_rates,
    find_averaging_optimizer,
    make_optimizer,
)
from training.plan import TrainingPlan
from training.reports.logs import Logs
from training.reports.reporter import RunReporter
from training.saver import restore
from training.saving.files import MinuteClock, Saver
from training.saving.states import ForeignState, SavedState
from training.targets.passes import compare_with_clip
from training.trainable import (
    LearningRates,
    Trainable,
    join_experts,
    prepare_network,
    seed_networks,
    share_network,
)
from training.training_run import Requests, TrainedModel, TrainingRun, trigger_paths
from training.validation import Validation
from training.whole_checkpoint import prepare_full_model

if TYPE_CHECKING:  # loaded only with LoRA files, with prompts
    from networks.apply import LoraPatch
    from networks.gated_loras import AddedLoras
    from networks.loading import WeightedLora
    from training.samples import Sampler

logger = logging.getLogger(__name__)


def load_model(plan: TrainingPlan, swap: SwapOptions) -> TrainedModel:
    """Load the networks, attach what is trained, create the optimizer, and restore the state of --resume.

    1. Load each expert, and add its LoRA or select its trained weights; then load networks only for samples.
    2. Join the trained parameters of all experts and features, and create optimizer and schedule.
    3. Run the hooks of features, and restore the saved state.

    Text encoders that run during training are loaded already. The trained ones get a part of the LoRA.

    Args:
        plan: The plan of the run.
        swap: Block swap of the plan, with auto resolved.
    """
    accelerator = plan.accelerator
    loader = NetworkLoader(plan, swap)
    encoders = {} if plan.live_encoders is None else plan.live_encoders.networks_with_new_word
    # networks that features train in addition to the LoRA, such as the vectors of a new word
    auxiliary_learners = [
        make(encoders, plan.progress.seed, True) for make in plan.features.on.auxiliary_learners
    ]
    initial_lora = None if plan.options.network is None else plan.options.network.network_weights
    if initial_lora is not None:
        _check_initial_lora(plan, initial_lora, auxiliary_learners)
    builder = TrainableBuilder(plan, auxiliary_learners)
    networks = []
    for index in range(len(plan.family.experts)):
        network = loader.load(plan.family, index)
        builder.add(network.dit, network.expert)  # its LoRA, or its own weights
        loader.set_up_network(network)
        networks.append(network.dit)
    sample_networks = networks
    if loader.has_sample_only_networks:
        sample_networks = _load_sample_networks(loader, builder, networks)
    trainable = builder.join()
    if len(trainable.groups) > 1:
        _check_group_learning_rates(plan, trainable)
    optimizer, optimizer_name = make_optimizer(plan.options.optimizer, trainable.groups)
    schedule = make_lr_schedule(plan.options.lr_schedule, optimizer, plan.steps.total_steps)
    averaging = find_averaging_optimizer(optimizer)
    if averaging is not None:
        averaging.train()  # a schedule-free optimizer refuses steps before this call
    scaler = accelerator.scaler or torch.amp.GradScaler(accelerator.device.type, enabled=False)
    model = TrainedModel(
        plan=plan,
        dits=experts.ExpertNetworks(networks, loader.host_copies, loader.adapters),
        sample_dits=experts.ExpertNetworks(sample_networks, loader.host_copies, loader.sample_loras),
        loader=loader,
        trainable=trainable,
        optimizer=optimizer,
        optimizer_name=optimizer_name,
        schedule=schedule,
        scaler=scaler,
        stepping=_make_stepping(plan, trainable, optimizer, scaler),
    )
    for hook in plan.features.on.after_load:
        hook(model)
    for adapter in model.dits.loras:
        adapter.place_on(accelerator.device, model.compute_dtype)
    if plan.saved is not None or plan.progress.step:
        restore(model)
    return model


def _check_initial_lora(
    plan: TrainingPlan, lora: Path, auxiliary_learners: Sequence[AuxiliaryLearner]
) -> None:
    """Warn if the --network_weights LoRA has embeddings that would be lost, or another prediction type."""
    with open_checkpoint(lora) as checkpoint:
        words_in_file = {get_embedding_word(name) for name in checkpoint.tensors} - {""}
        metadata = checkpoint.metadata
    trained_words = {
        get_embedding_word(name) for auxiliary in auxiliary_learners for name in auxiliary.tensors()
    }
    for word in sorted(words_in_file - trained_words):
        logger.warning(
            "%s contains the word %s, which is not trained further and will not be in the new file. Pass "
            "--train_embedding %s to train both",
            lora,
            word,
            word,
        )
    if plan.family.noise.keeps_variance:
        from networks.predictions import compare_predictions  # of models that may predict noise or v

        compare_predictions({lora: metadata}, plan.family.noise.predicts_v)


def _load_sample_networks(
    loader: "NetworkLoader", builder: "TrainableBuilder", networks: Sequence[nn.Module]
) -> list[nn.Module]:
    """Load the networks that only samples use."""
    # Return all networks of samples, in the order of the experts.
    plan = loader.plan
    network_by_file = dict(zip(plan.family.dit_files, networks, strict=True))
    join = plan.sample_family.abilities.join_sample_networks
    # if samples use none of the trained networks, the trained LoRA is added to the networks loaded here
    uses_trained = join is not None or bool(network_by_file.keys() & set(plan.sample_family.dit_files))
    sample_networks = []
    for index, file in enumerate(plan.sample_family.dit_files):
        if file not in network_by_file:
            network = loader.load(plan.sample_family, index)
            if not uses_trained:
                builder.add(network.dit, network.expert)
            loader.set_up_network(network)
            network.dit.eval()  # unlike the trained ones, whose checkpointing depends on the mode
            network_by_file[file] = network.dit
        sample_network = network_by_file[file]
        if join is not None:
            joined = join(networks[index], sample_network)
            loader.host_copies[joined] = loader.host_copies.pop(sample_network)
            sample_network = joined
        sample_networks.append(sample_network)
    return sample_networks


def _check_group_learning_rates(plan: TrainingPlan, trainable: Trainable) -> None:
    """Raise OptionError if the optimizer does not support different learning rates, or one of them."""
    rates = {
        f"the learning rate of {name}": group["lr"]
        for name, group in zip(trainable.group_names, trainable.groups, strict=True)
    }
    if len(rates) > 1:
        check_rates(plan.options.optimizer, rates)


def make_run(
    model: TrainedModel,
    sampler: "Sampler | None",
    memory: MemoryWatch | None,
    logs: Logs,
    reporter: RunReporter,
    saver: Saver | None,
) -> TrainingRun:
    """Create the run with its feed, the losses of training and validation, and a watcher of request files."""
    plan = model.plan
    rule, validation_rule = _make_loss_rules(model)
    paths: Mapping[Path, str] = {}
    clock: MinuteClock | None = None
    if plan.accelerator.is_main_process:
        paths = trigger_paths(plan.names, plan.options.samples.sample_now)
        minutes = plan.saving.save_every_n_minutes
        clock = None if minutes is None else MinuteClock(minutes)
    return TrainingRun(
        model=model,
        feed=_make_feed(model),
        rule=rule,
        validation=Validation(plan, validation_rule) if plan.validation else None,
        make_measuring=functools.partial(Validation, plan, validation_rule),
        sampler=sampler,
        memory=memory,
        logs=logs,
        reporter=reporter,
        requests=Requests(paths, sampler is not None, clock=clock),
        saver=saver,
        phases=make_phases(plan.features),
    )


def _make_loss_rules(model: TrainedModel) -> tuple[LossRule, LossRule]:
    """Return how the loss is computed in training and in validation, which has no passes of features."""
    plan, features = model.plan, model.plan.features
    validation_rule = LossRule(
        plan.options.loss,
        plan.options.predicted,
        as_base=model.trainable.as_base if model.trainable.networks else None,
        always_runs_base_model=plan.steps.in_lockstep and BASE_MODEL in features.needs,
    )
    rule = replace(
        add_phases(validation_rule, features) if features.added else validation_rule,
        in_lockstep=plan.steps.in_lockstep,
        seed=plan.progress.seed,
        seed_networks=functools.partial(
            seed_networks, model.trainable, plan.progress.seed, device=plan.accelerator.device
        ),
    )
    if VALIDATION_TARGETS in features.added:
        comparing = features.wrap(VALIDATION_TARGETS, compare_with_clip)
        validation_rule = replace(validation_rule, list_comparisons=comparing)
    return rule, validation_rule


def _make_feed(model: TrainedModel) -> Feed:
    """Return the feed, which reads the micro-batches of this process and adds noise to them."""
    plan = model.plan
    options, family, accelerator = plan.options, plan.family, plan.accelerator
    features = plan.features
    noise_sampler = NoiseSampler(
        options.timesteps,
        plan.progress.seed,
        noise_spec=family.noise,
        latent=family.latent,
        experts=tuple(family.experts),
        perturbations=tuple(features.on.noise),
        weighted_by=options.weighted_by,
        audio=family.audio_learning if trains_audio(family) else None,
        batch_hooks=tuple(features.on.batch),
        caption_choices=() if plan.network_spec.custom is None else plan.network_spec.custom.sentences,
        condition_set=features.condition_set,
    )
    return Feed(
        order=plan.order,
        sources=plan.sources,
        noise_sampler=noise_sampler,
        plan=plan.steps,
        # processes that share the tokens of a clip read the same micro-batches
        process=accelerator.process_index // plan.steps.processes_per_batch,
        workers=options.loop.max_data_loader_n_workers,
        pin_memory=accelerator.device.type == "cuda",
        reads_undropped=DROPPED_CAPTIONS in features.needs and CAPTION in family.teacher_only_conditions,
        reads_empty=EMPTY_PROMPT in features.needs,
        table_times=plan.table_times,
        reads_rejected=REJECTED_ONES in features.needs,
    )


@dataclass(frozen=True)
class UnpreparedNetwork:
    """A loaded, frozen DiT before its frozen LoRAs are added and its blocks are set up for training."""

    dit: nn.Module
    family: Family
    index: int  # index of its expert
    expert: Expert
    host_weights: "HostWeights | None"  # holds swapped weights; None: all weights are on the device
    # splits blocks over processes; None: each process has the whole network
    block_sharder: BlockSharder | None


@dataclass
class NetworkLoader:
    """Load networks one after the other, into host memory if they alternate on the device."""

    plan: TrainingPlan
    swap: SwapOptions  # auto is resolved
    sample_loras: "list[AddedLoras]" = field(default_factory=list)
    adapters: "list[AddedLoras]" = field(default_factory=list)  # --training_adapter in trained networks
    # host copies of networks that take turns
    host_copies: dict[nn.Module, HostCopy] = field(default_factory=dict)

    has_sample_only_networks: bool = field(init=False)  # whether samples need networks that are not trained
    joins_in_samples: bool = field(init=False)  # whether those join the trained ones, which stay
    takes_turns: bool = field(init=False)  # whether one network is on the device at a time

    def __post_init__(self) -> None:
        plan = self.plan
        has_samples = plan.options.samples.sample_prompts is not None
        self.has_sample_only_networks = has_samples and plan.sample_family is not plan.family
        alternates = len(plan.family.experts) > 1 and plan.options.by_expert.offload_inactive_dit
        self.joins_in_samples = plan.sample_family.abilities.join_sample_networks is not None
        self.takes_turns = alternates or (self.has_sample_only_networks and not self.joins_in_samples)

    def load(self, family: Family, index: int) -> UnpreparedNetwork:
        """Load and freeze the network of an expert, with LoRAs merged for training or for samples.

        1. Choose where its weights are kept: on the device, in host memory, or sharded over processes.
        2. Read the LoRAs to merge, and load the network with them.
        3. Wrap the layers whose LoRAs cannot be merged.

        A network to train gets the training dtype. The caller adds the trained LoRA before `set_up_network`.
        """
        plan, options, device = self.plan, self.plan.options, self.plan.accelerator.device
        expert = family.experts[index]
        # where the weights are kept: in host memory if they are swapped, or sharded over processes
        only_samples = self._only_samples(family)
        host_weights = make_host_weights(
            family.dit, self.swap, device, all_weights=self.takes_turns or only_samples
        )
        block_sharder: BlockSharder | None = None
        if options.speed.modes.hooks.make_block_sharder:
            block_sharder = make_block_sharder(options.speed, device)
        placement = replace(
            experts.choose_placement(options, device, plan.quantization, trained=not only_samples),
            host_weights=host_weights,
            block_sharder=block_sharder,
        )
        # LoRAs that are merged into the weights while these are read, and T-LoRAs, which wrap layers later
        patch: LoraPatch | None = None
        t_loras: Sequence[WeightedLora] = ()
        network_options = experts.network_for(options, expert)
        if plan.features.merge is not None and network_options is not None and self._takes_loras(family):
            loras = plan.features.merge(expert)
            if loras.uses:
                patch, t_loras = self._read_merged(loras, network_options, family, index)
                if patch is not None:
                    # a DoRA learns the norms of merged weights, so none of its LoRAs may stay unmerged
                    placement = replace(
                        placement,
                        patch=patch,
                        leave_unmerged=None if network_options.decomposes else patch.leave_unmerged,
                    )
        dit = family.load_dit(placement, index)
        compute_dtype = get_compute_dtype(dit)
        autocast = experts.AUTOCAST.get(options.accelerator.mixed_precision)
        if autocast is not None:
            experts.check_dtype(family, options, compute_dtype)
            compute_dtype = autocast
        if patch is not None or t_loras:
            _wrap_unmerged(dit, patch, t_loras, device, compute_dtype)
        warn_if_emulated(device, compute_dtype, "the transformer")
        dit.requires_grad_(False)
        if block_sharder is not None and plan.shards_model:
            block_sharder.split(dit)
        return UnpreparedNetwork(
            dit, family, index, expert, host_weights=host_weights, block_sharder=block_sharder
        )

    def _only_samples(self, family: Family) -> bool:
        return family is self.plan.sample_family and family is not self.plan.family

    def _takes_loras(self, family: Family) -> bool:
        """Return whether LoRAs act in a network: not in a teacher, nor in one that joins the trained one."""
        if self._only_samples(family):
            return not self.joins_in_samples
        return family is self.plan.family

    def _read_merged(
        self, loras: MergedLoras, network: NetworkOptions, family: Family, index: int
    ) -> "tuple[LoraPatch | None, Sequence[WeightedLora]]":
        """Read the LoRAs to merge into an expert: a patch or None, and T-LoRAs, which wrap layers instead."""
        # For a DoRA, T-LoRAs are in the patch too, because it learns the norms of the merged weights.
        from networks.apply import LoraPatch  # only with LoRAs to merge
        from networks.depth_variants import fit_to_file
        from networks.rounding import LoraRounding
        from networks.unmerged_loras import split_masked

        weighted_loras = loras.uses
        if family.dit_files:  # without files, the network is built in code
            weighted_loras = fit_to_file(weighted_loras, family.dit_files[index])
        merged, t_loras = (weighted_loras, []) if network.decomposes else split_masked(weighted_loras)
        if not merged:
            return None, t_loras
        return LoraPatch(merged, rounding=LoraRounding(loras.rounding)), t_loras

    def set_up_network(self, network: UnpreparedNetwork) -> None:
        """Add the frozen LoRAs to a loaded network, and compile, checkpoint and swap its blocks.

        Raises:
            MemoryPlanError: If the device has too little memory for the next network.
        """
        options, device = self.plan.options, self.plan.accelerator.device
        dit, family = network.dit, network.family
        if family is self.plan.family:  # not for a network of another family, which only samples use
            for add in self.plan.features.on.before_setup:
                add(network)
        has_samples = options.samples.sample_prompts is not None
        if has_samples or options.frozen.training_adapter is not None:
            self._add_frozen_loras(network, has_samples)
        self.set_up_blocks(network)
        if self.plan.quantization is not None and device.type == "cpu":
            keep_heap_small()  # otherwise temporary whole weights fragment the heap
        if self.takes_turns or self._only_samples(family):
            self.host_copies[dit] = HostCopy(dit, device, network.host_weights)
        elif network.index + 1 < len(family.experts) and device.type == "cuda":
            size = bytes_on(dit, device)
            room = spare_bytes(device)
            if size > room:
                raise MemoryPlanError(
                    f"both transformers do not fit on the device: one takes {format_gib(size)} GiB, "
                    f"{format_gib(room)} GiB are left next to it. Use --offload_inactive_dit, so that they "
                    "take turns, or --blocks_to_swap"
                )

    def set_up_blocks(self, network: UnpreparedNetwork) -> None:
        """Compile, checkpoint and swap the blocks of a network; divide its tokens among processes."""
        options, device = self.plan.options, self.plan.accelerator.device
        experts.set_up_network(
            network.dit,
            network.family.dit,
            options.loop,
            device,
            compilation=options.speed.compilation.choice,
            host_weights=network.host_weights,
            block_sharder=network.block_sharder,
        )
        divides_tokens = bool(options.speed.modes.hooks.finish_network)
        if divides_tokens:
            finish_network(network.dit, options.speed, device)

    def _add_frozen_loras(self, network: UnpreparedNetwork, has_samples: bool) -> None:
        """Add --training_adapter and, for samples, --sample_lora and LoRAs of a family's denoising stages."""
        # All of them are disabled: a training step enables the adapter, a sample the others.
        options, family = self.plan.options, network.family
        if family is self.plan.family and options.frozen.training_adapter is not None:
            adapter = experts.read_adapter(options, network.expert, family.experts)
            if adapter is not None:
                from networks.gated_loras import add_loras  # only with LoRA files

                is_compiled = options.speed.compilation.choice is not None
                self.adapters.append(add_loras(network.dit, [adapter], is_compiled, experts.TRAINING_ADAPTER))
        if has_samples:
            # Add --sample_lora to a network, and the LoRAs of its family's denoising stages
            options, dit = self.plan.options, network.dit
            is_compiled = options.speed.compilation.choice is not None
            sample_files = options.samples.loras()
            if sample_files and self._takes_loras(family):
                from networks.gated_loras import add_loras  # only with LoRA files
                from networks.loading import read_weighted_lora

                expert = network.expert.name
                loras = [read_weighted_lora(path, expert, multiplier) for path, multiplier in sample_files]
                self.sample_loras.append(add_loras(dit, loras, is_compiled))
            if get_stage_files(dit):
                from networks.gated_loras import add_stage_loras

                add_stage_loras(dit, is_compiled)


def _wrap_unmerged(
    dit: nn.Module,
    patch: "LoraPatch | None",
    t_loras: "Sequence[WeightedLora]",
    device: torch.device,
    compute_dtype: torch.dtype,
) -> None:
    """Wrap layers whose LoRAs could not be merged: LoRAs of quantized weights, and T-LoRAs."""
    if patch is not None:
        patch.check()
        if patch.unmerged:
            from networks.unmerged_loras import add_unmerged  # only for quantized weights

            add_unmerged(dit, patch.unmerged, device, compute_dtype)
    if t_loras:
        from networks.unmerged_loras import add_unmerged, masked_changes  # only with T-LoRAs

        add_unmerged(dit, masked_changes(dit, t_loras), device, compute_dtype)


@dataclass
class TrainableBuilder:
    """Create the trained parameters of one network after the other, and join them in a `Trainable`."""

    plan: TrainingPlan
    auxiliary_learners: Sequence[
        AuxiliaryLearner
    ] = ()  # trained in addition to the network, such as embeddings
    trainables: list[Trainable] = field(default_factory=list)

    def add(self, dit: nn.Module, expert: Expert) -> None:
        """Add the network to a DiT, or select the trained parameters of the DiT itself.

        All DiTs share one network, unless each expert has its own (--lora_per_expert).
        """
        options, device = self.plan.options, self.plan.accelerator.device
        network_spec = self.plan.network_spec
        if options.network is None:
            self.trainables.append(self._train_full(dit))
            return
        network_options = experts.network_for(options, expert) or options.network
        live_encoders = self.plan.live_encoders
        network = network_spec.make_network(
            network_options,
            dit,
            self.plan.progress.seed,
            encoders={} if live_encoders is None else live_encoders.networks_for(network_spec.is_embedding),
            trains_dit=options.lora_parts is None or options.lora_parts.trains_dit,
            resumed_tensors={} if self.plan.saved is None else self._saved_tensors(self.plan.saved, expert),
        )
        if self.trainables and not options.by_expert.lora_per_expert:
            # another DiT: its network uses the parameters of the first DiT's network
            self.trainables = [share_network(self.trainables[0], network, device)]
            return
        rates = LearningRates(options.optimizer.learning_rate)
        if options.lora_parts is not None:
            rates = self._get_part_learning_rates(options.lora_parts, rates.default)
        trainable = prepare_network(
            network,
            rates,
            max_norm=network_options.scale_weight_norms,
            device=device,
            lora_format=self.plan.lora_format,
            network_spec=network_spec,
            list_auxiliary_tensors=self._list_auxiliary_tensors if self.auxiliary_learners else dict,
        )
        self.trainables.append(trainable)

    def join(self) -> Trainable:
        """Join all trained parts: the networks of the experts, and other parameters such as embeddings."""
        if len(self.trainables) == 1:
            trainable = self.trainables[0]
        else:
            names = [expert.name for expert in self.plan.family.experts]
            trainable = join_experts(dict(zip(names, self.trainables, strict=True)))
        for auxiliary in self.auxiliary_learners:
            trainable = auxiliary.add_to(
                trainable,
                self.plan.options.optimizer.learning_rate,
                total_steps=self.plan.steps.total_steps,
                device=self.plan.accelerator.device,
            )
        return trainable

    def _list_auxiliary_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name that are saved in a LoRA's file in addition to the LoRA."""
        tensors: dict[str, Tensor] = {}
        for auxiliary in self.auxiliary_learners:
            tensors |= auxiliary.tensors_for_lora_file()
        return tensors

    def _train_full(self, dit: nn.Module) -> Trainable:
        options = self.plan.options
        assert options.full_dit is not None  # without a network, the model itself is trained
        if self.plan.shards_model:
            from training.saving.split_model import prepare_sharded_dit  # only if it is split

            rates = get_part_rates(self.plan.family)
            parts = options.full_dit.name_parts
            file_layout = SavedForm(options.full_dit.shard_bytes)
            full = prepare_sharded_dit(dit, options.optimizer.learning_rate, parts, rates, file_layout)
        else:
            full = prepare_full_model(self.plan.family, options, dit, self.plan.live_encoders)
        return arrange_weights(full, options.optimizer, self.plan.family.dit)

    def _saved_tensors(self, saved: SavedState | ForeignState, expert: Expert) -> dict[str, Tensor]:
        """Return the tensors of an expert's network from the state of --resume."""
        if isinstance(saved, SavedState):
            part = f"{expert.name}_network" if self.plan.options.by_expert.lora_per_expert else "network"
            return {**saved.parts.get(part, {})}
        return {**saved.network}

    def _get_part_learning_rates(self, parts: PartsOptions, default: float) -> LearningRates:
        """Return the learning rates of the network's layers in the DiT and in the trained text encoders."""
        live_encoders = self.plan.live_encoders
        if live_encoders is None or not live_encoders.learning_encoders:
            return LearningRates(default, dit=parts.unet_lr)
        # --text_encoder_lr has a value for each encoder that could be trained
        prefixes = live_encoders.trainable_prefixes
        rates = dict(zip(prefixes, parts.text_rates(len(prefixes), default), strict=True))
        trained_rates = [rates[encoder.lora_prefix] for encoder in live_encoders.learning_encoders]
        return LearningRates(default, dit=parts.unet_lr, text_encoders=trained_rates)


def _make_stepping(
    plan: TrainingPlan, trainable: Trainable, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> stepping.StepAfterBackward | stepping.FusedBackward:
    """Return the object that steps the weights: all together, one by one, or inside the backward pass."""
    # Weights are stepped one by one if a step needs temporary copies of a weight: float32 values of a bf16
    # weight, all rows of a sharded one, or optimizer states from host memory.
    options, max_norm = plan.options, plan.options.optimizer.max_grad_norm
    full_dit, sharded_weights = options.full_dit, trainable.sharded_weights
    optimizer_class = type(optimizer)
    rounds_to_bf16 = full_dit is not None and full_dit.full_bf16
    offloads_states = full_dit is not None and full_dit.offloads_states
    # an optimizer that needs whole matrices gathers the rows of sharded ones, one weight at a time
    gathers_weights = bool(sharded_weights) and not stepping.is_elementwise(optimizer_class)
    needs_parameter_steps = options.is_fused or gathers_weights or rounds_to_bf16 or offloads_states
    parameter_steps: stepping.ParameterSteps | None = None  # steps each parameter by itself
    if needs_parameter_steps and stepping.can_step_one_parameter(optimizer_class):
        parameter_steps = stepping.ParameterSteps(
            optimizer, trainable.names, plan.progress, sharded_weights, offloads_states=offloads_states
        )
    elif needs_parameter_steps:  # only --full_bf16: such an optimizer was rejected with the other options
        logger.warning(
            "--full_bf16: this optimizer's steps are rounded to the nearest bf16, which loses small ones."
        )
    if parameter_steps is None or not options.is_fused:
        return stepping.StepAfterBackward(
            optimizer,
            trainable.parameters,
            max_norm,
            scaler,
            networks=trainable.all_networks,
            parameter_steps=parameter_steps,
        )
    if max_norm > 0:
        logger.warning(
            "--fused_backward_pass clips the gradient of each weight by itself to --max_grad_norm "
            f"{max_norm}."
        )
    return stepping.FusedBackward(parameter_steps, trainable.parameters, max_norm)
