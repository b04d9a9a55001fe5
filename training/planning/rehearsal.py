"""Rehearse a training step on tensors without content.

It runs the code of a real step and counts the bytes in use on the device throughout.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dataset.table import DatasetTable
from modules.devices import get_compute_dtype
from modules.private_torch import disable_modes
from networks.gated_loras import add_loras
from protocols.family import Trains
from runtime.offload.checkpointing import recomputed_parts
from runtime.planning import dry_run as dry
from training.data.live import LiveTextEncoders
from training.experts import AUTOCAST, TRAINING_ADAPTER, read_adapter, set_up_network
from training.features.composing import begin_run
from training.features.hooks import RunFeatures
from training.features.loss_phases import add_phases
from training.features.phases import PREDICT
from training.learner import find_network_spec
from training.loss import Autocast, LossRule, NoisyBatch
from training.optimizers.optimizer import arrange_weights, find_averaging_optimizer, make_optimizer
from training.optimizers.stepping import (
    FusedBackward,
    ParameterSteps,
    StepAfterBackward,
    can_step_one_parameter,
)
from training.options import TrainingOptions
from training.processes import compute_gradient_norm, fill_missing_gradients
from training.steps import Progress
from training.targets.passes import TrainingPasses, training_loss
from training.whole_checkpoint import prepare_full_model

logger = logging.getLogger(__name__)

STEP = "optimizer step"
# Packages written in torch's operations alone. Custom kernels would write to memory that does not exist.
REHEARSABLE = {"torch", "transformers", "prodigyopt", "lion_pytorch", "schedulefree"}
MAX_WEIGHT_SIDE = (
    512  # maximum rows and columns of a copied weight; larger than 4096 elements, so states are 8-bit
)
# Bytes of states for each element of a weight, for classes that do not run on a CPU. 8-bit states: one
# byte a moment, and a float32 scale for every 256 elements of it. Source: bitsandbytes' documentation of
# block-wise quantization. Paged states are in host memory.
STATE_BYTES = {"AdamW8bit": 2 * (1 + 4 / 256), "PagedAdamW8bit": 0.0, "Lion8bit": 1 + 4 / 256}
DEFAULT_STATE_BYTES = 8.0  # bytes per element if states cannot be measured: two float32 moments


@dataclass
class Rehearsal:
    """A DiT and its optimizer on tensors without storage, to measure the peak memory of a training step."""

    family: Trains
    options: TrainingOptions
    ledger: dry.Ledger
    dit: nn.Module
    parameters: list[Parameter]
    optimizer: Optimizer
    parameter_steps: ParameterSteps | None  # steps single weights; None: all are stepped together
    states: list[Tensor]  # stand-ins for the average, and for states that a rehearsal cannot make
    blocks: Mapping[str, list[nn.Module]]  # all blocks, by the name of their list
    live_encoders: LiveTextEncoders | None = None  # encoded in each step, without content
    # with --fused_backward_pass, once the optimizer has its states
    fused_backward: FusedBackward | None = None
    tables: Sequence[DatasetTable] = ()  # of the dataset
    # functions of features that return the context of a pass with gradients
    host_batch: NoisyBatch | None = None  # the batch with values, for features that read them

    @property
    def num_blocks(self) -> dry.Counts:
        """Number of blocks in each block list of the DiT."""
        return tuple(map(len, self.blocks.values()))

    @property
    def host_activation_bytes(self) -> int:
        """Host memory of --gradient_checkpointing_cpu_offload in bytes: the inputs of all blocks but one."""
        if not self.options.loop.gradient_checkpointing_cpu_offload:
            return 0
        inputs = [self.ledger.input_bytes[name] for name, blocks in self.blocks.items() for _ in blocks]
        return sum(inputs[:-1])

    def measure_passes(self, noisy_batch: NoisyBatch, counts: dry.Counts) -> dict[str, dry.BytesByKind]:
        """Run forward and backward with `counts` blocks of each list; return the peak memory of each phase.

        Tensors have sizes but no values, and the ledger counts their bytes. The optimizer's step is not
        included. Afterwards the DiT has all the blocks that it had before the call.
        """
        dry.truncate_blocks(self.dit, self.blocks, counts, self.ledger)
        if self.options.loop.gradient_accumulation_steps > 1:
            self.fill_gradients()  # of the previous micro-batches
        self.ledger.begin_phase("text encoders")
        self.ledger.forget_peaks()
        self.ledger.is_backward = False
        if self.live_encoders is not None:
            with make_autocast(self.options, self.ledger.device)():
                batch = self.live_encoders.add_encoded_captions(noisy_batch.batch)
            noisy_batch = replace(noisy_batch, batch=batch).to(self.ledger.device)
        self.ledger.begin_phase("forward outside the blocks")
        autocast = make_autocast(self.options, self.ledger.device)
        # The run's loss rule, set to run every pass that some noise level or mask needs
        features = begin_run(self.options, self.family, self.tables)
        rule = LossRule(
            self.options.loss,
            self.options.predicted,
            as_base=contextlib.nullcontext,  # in the base model's passes the network stays in place
            in_lockstep=True,  # so that every pass runs, whatever the noise levels and masks
        )
        rule = add_phases(rule, features)
        if rule.predict is not None and self.host_batch is not None:
            rule = replace(rule, predict=functools.partial(_predict_on_device, features, self.host_batch))
        # families may read noise levels, whose values change no sizes
        with self.ledger.reading_unknown_as_one():
            loss = training_loss(self.family, self.dit, noisy_batch, autocast=autocast, rule=rule)
        self.ledger.is_backward = True
        self.ledger.begin_phase("backward outside the blocks")
        # with --fused_backward_pass optimizers run in the backward pass, and may read values
        with self.ledger.reading_unknown_as_one() if self.fused_backward else contextlib.nullcontext():
            loss.backward()
            peaks = dict(self.ledger.peaks)
            if self.fused_backward is not None:
                self.fused_backward.finish(self.parameters)
        self.register_optimizer_states()
        self.clear_gradients()
        dry.truncate_blocks(self.dit, self.blocks, self.num_blocks, self.ledger)
        return peaks

    def rehearse_optimizer(self) -> dict[str, dry.BytesByKind]:
        """Create the optimizer's states by simulating a step with gradient clipping.

        Returns:
            The peak memory of the step, as the only phase; empty if the states are merely estimated, or if
                weights are stepped during the backward pass.
        """
        phase_peaks: dict[str, dry.BytesByKind] = {}
        package = type(self.optimizer).__module__.partition(".")[0]
        if package in REHEARSABLE:  # its optimizers can step tensors without values
            phase_peaks = {STEP: self._rehearse_optimizer_step()}
        else:
            with self.ledger.allocating(dry.OPTIMIZER):
                size = estimate_state_bytes(self.optimizer, self.parameters)
                self.states.append(torch.empty(size, dtype=torch.uint8, device=self.ledger.device))
        if not self.options.is_fused:
            return phase_peaks
        assert self.parameter_steps is not None  # `check_optimizer` rejects optimizers that step all weights
        if self.fused_backward is None:  # from now on, the backward pass steps the weights
            max_norm = self.options.optimizer.max_grad_norm
            self.fused_backward = FusedBackward(self.parameter_steps, self.parameters, max_norm)
        return {}

    def _rehearse_optimizer_step(self) -> dry.BytesByKind:
        """Simulate an optimizer step on tensors without storage; return the bytes by kind at its peak."""
        self.fill_gradients()
        self.ledger.begin_phase(STEP)
        self.ledger.forget_peaks()
        scaler = torch.amp.GradScaler(self.ledger.device.type, enabled=False)
        max_norm = self.options.optimizer.max_grad_norm
        stepping = StepAfterBackward(
            self.optimizer, self.parameters, max_norm, scaler, parameter_steps=self.parameter_steps
        )
        with self.ledger.reading_unknown_as_one():  # the norm of tensors without values reads as 1
            stepping.step(compute_gradient_norm(self.parameters))
        self.register_optimizer_states()
        self.clear_gradients()
        states = self.ledger.bytes_by_kind.get(dry.OPTIMIZER, 0)
        peak = self.ledger.peaks[STEP]
        # the states were allocated during the step, and counted as working memory
        working = peak[dry.TEMPORARY] - states
        return {**peak, dry.OPTIMIZER: states, dry.TEMPORARY: working}

    def register_optimizer_states(self) -> None:
        """Register the optimizer's tensors as optimizer states, because a step may have replaced them."""
        for value in list_states(self.optimizer):
            self.ledger.track(value, dry.OPTIMIZER)

    def fill_gradients(self) -> None:
        """Give every trained weight a gradient, as after a backward pass."""
        with self.ledger.allocating(dry.GRADIENTS):
            fill_missing_gradients(self.parameters)

    def clear_gradients(self) -> None:
        """Release all gradients, so that the next phase is counted without them."""
        for parameter in self.parameters:
            parameter.grad = None


def rehearse(
    family: Trains,
    options: TrainingOptions,
    dit: nn.Module,
    noisy_batch: NoisyBatch,
    live_encoders: LiveTextEncoders | None = None,
    watch: Callable[[nn.Module], dry.Extrapolate] = dry.extrapolate_on_one_device,
    tables: Sequence[DatasetTable] = (),
) -> tuple[dict[str, dry.BytesByKind], int]:
    """Return the peak memory of each phase of a training step, and the bytes of activations on the host.

    The optimizer has its states already, as in every step after the first one.

    Args:
        family: The model family.
        options: Options of the run.
        dit: The network as loaded, on the meta device; do not use it afterwards.
        noisy_batch: Batch on the CPU.
        live_encoders: Text encoders that run in each step, on the meta device too.
        watch: Given the network, returns the function that computes memory with all blocks from a few.
        tables: Tables of the dataset.
    """
    with dry.dry_run() as ledger:
        rehearsal = set_up_trainable(family, options, dit, ledger=ledger, live_encoders=live_encoders)
        rehearsal.tables = tables
        # first: the states that it creates count in the other phases
        phase_peaks = rehearsal.rehearse_optimizer()
        device_batch = noisy_batch.moved(lambda tensor: empty_like_on_device(tensor, ledger))
        rehearsal.host_batch = noisy_batch
        # measures a step with a few blocks of each list
        measure: Callable[[dry.Counts], Mapping[str, dry.BytesByKind]]
        measure = functools.partial(rehearsal.measure_passes, device_batch)
        if PREDICT in options.features.added:
            # some blocks get fewer tokens than others, so all blocks are measured instead of extrapolated
            measure = functools.partial(_as_measured, measure(rehearsal.num_blocks))
        extrapolate = watch(dit)  # computes the memory with all blocks from steps with a few
        phase_peaks |= extrapolate(measure, rehearsal.num_blocks)
        return phase_peaks, rehearsal.host_activation_bytes


def _predict_on_device(
    features: RunFeatures, host_batch: NoisyBatch, passes: TrainingPasses, device_batch: NoisyBatch
) -> Tensor:
    """Run a pass with gradients; show features the batch on the host, as that on the device has no values."""

    def predict(passes: TrainingPasses, _: NoisyBatch) -> Tensor:
        return passes.predict(device_batch)

    return features.wrap(PREDICT, predict)(passes, host_batch)


def _as_measured(phase_peaks: Mapping[str, dry.BytesByKind], _: dry.Counts) -> Mapping[str, dry.BytesByKind]:
    """Return `phase_peaks`, measured with all blocks; ignore the number of blocks."""
    return phase_peaks


def _add_adapters(family: Trains, options: TrainingOptions, dit: nn.Module, ledger: dry.Ledger) -> None:
    """Add the --training_adapter of each expert; all but the first are disabled and only occupy memory."""
    with disable_modes():  # the file has real tensors
        uses = [read_adapter(options, expert, family.experts) for expert in family.experts]
    is_compiled = options.speed.compilation.choice is not None
    adapters = [add_loras(dit, [use], is_compiled, TRAINING_ADAPTER) for use in uses if use is not None]
    with ledger.allocating(dry.ADAPTER):
        computed = AUTOCAST.get(options.accelerator.mixed_precision, get_compute_dtype(dit))
        for adapter in adapters:
            adapter.place_on(ledger.device, computed)
    for layer in adapters[0].layers if adapters else ():
        layer.is_on = True


def set_up_trainable(
    family: Trains,
    options: TrainingOptions,
    dit: nn.Module,
    ledger: dry.Ledger,
    live_encoders: LiveTextEncoders | None = None,
) -> Rehearsal:
    """Prepare a DiT on tensors without storage for a simulated step, which predicts the memory of a real one.

    In the order of a real run:

    1. Add the network, or select the trained weights.
    2. Compile and checkpoint the blocks.
    3. Create the optimizer, the hooks that count gradients, and the average of the weights.
    """
    dry.allocate_empty_weights(dit, ledger)
    for encoder in () if live_encoders is None else live_encoders.encoders:
        for module in dry.modules_in(encoder):
            dry.allocate_empty_weights(module.requires_grad_(False), ledger, dry.TEXTS)
    dit.requires_grad_(False)
    groups = _make_optimizer_groups(family, options, dit, ledger=ledger, live_encoders=live_encoders)
    blocks = family.dit.blocks(dit)
    dry.keep_kernels(recomputed_parts(dit, family.dit))
    dry.track_blocks(blocks, ledger)
    set_up_network(dit, family.dit, options.loop, ledger.device)
    optimizer = _make_optimizer_as_on_gpu(options, groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        # a layer that is skipped by its dropout has no gradient
        parameter.register_post_accumulate_grad_hook(
            lambda weight: None if weight.grad is None else ledger.track(weight.grad, dry.GRADIENTS)
        )
    average = _allocate_average(options, parameters, ledger)
    return Rehearsal(
        family=family,
        options=options,
        ledger=ledger,
        dit=dit,
        parameters=parameters,
        optimizer=optimizer,
        parameter_steps=_make_parameter_steps(options, optimizer, parameters),
        states=average,
        blocks=blocks,
        live_encoders=live_encoders,
    )


def _allocate_average(
    options: TrainingOptions, parameters: Sequence[Parameter], ledger: dry.Ledger
) -> list[Tensor]:
    """Allocate the average of a LoRA's weights; the average of a whole model is in host memory instead."""
    if options.features.average is None or options.full_dit is not None:
        return []
    with ledger.allocating(dry.NETWORK):
        return [parameter.new_empty(parameter.shape, dtype=torch.float32) for parameter in parameters]


def _make_optimizer_as_on_gpu(options: TrainingOptions, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the run's optimizer, with foreach steps, which are the default on a GPU."""
    # outside of the dry run, because bitsandbytes reads values of a table that it creates
    with disable_modes():
        optimizer, _ = make_optimizer(options.optimizer, groups)
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # the default on a GPU, which needs more memory
    averaging = find_averaging_optimizer(optimizer)
    if averaging is not None:
        averaging.train()
    return optimizer


def _make_parameter_steps(
    options: TrainingOptions, optimizer: Optimizer, parameters: Sequence[Parameter]
) -> ParameterSteps | None:
    """Return the object that steps weights one at a time; None if all weights are stepped together."""
    full_dit = options.full_dit
    is_stepped_alone = options.is_fused or (
        full_dit is not None and (full_dit.full_bf16 or full_dit.offloads_states)
    )
    if not (is_stepped_alone and can_step_one_parameter(type(optimizer))):
        return None
    names: dict[Tensor, str] = {parameter: str(index) for index, parameter in enumerate(parameters)}
    return ParameterSteps(optimizer, names, Progress(0, 0, 0.0))


def _make_optimizer_groups(
    family: Trains,
    options: TrainingOptions,
    dit: nn.Module,
    *,
    ledger: dry.Ledger,
    live_encoders: LiveTextEncoders | None,
) -> list[dict[str, Any]]:
    """Add the network and adapters, or select trained weights of the DiT; return the optimizer's groups."""
    # The arguments 0 are seeds, which do not matter because tensors have no values.
    network_spec = find_network_spec(family, options.network, options.features.lora_replacement)
    if options.network is None:
        trainable = prepare_full_model(family, options, dit, live_encoders, writes=False)
        trainable = arrange_weights(trainable, options.optimizer, family.dit)
        return [dict(group) for group in trainable.groups]
    network_options = options.network
    if not network_options.dim_from_weights:
        network_options = replace(network_options, network_weights=None)  # the file is not read
    network = network_spec.make_network(
        network_options,
        dit,
        0,
        encoders={} if live_encoders is None else live_encoders.networks_for(network_spec.is_embedding),
        trains_dit=options.lora_parts is None or options.lora_parts.trains_dit,
        has_initial_values=False,
    )
    dry.allocate_empty_weights(network.module, ledger, dry.NETWORK)
    _add_adapters(family, options, dit, ledger)
    groups, _ = network.parameter_groups(options.optimizer.learning_rate)
    word_encoders = {} if live_encoders is None else live_encoders.networks_with_new_word
    # features may train other parameters alongside the network, such as the vectors of a new word
    for make in begin_run(options, family).on.auxiliary_learners:
        auxiliary = make(word_encoders, 0, False)
        dry.allocate_empty_weights(auxiliary.module, ledger, dry.NETWORK)
        groups.append(auxiliary.group(options.optimizer.learning_rate))
    return groups


def list_states(optimizer: Optimizer) -> list[Tensor]:
    """Return all tensors in an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def estimate_state_bytes(optimizer: Optimizer, parameters: Sequence[Parameter]) -> int:
    """Estimate the size in bytes of the states of an optimizer that cannot step tensors without storage.

    The size is looked up by the class's name, or measured in a real step on small weights on the CPU.
    """
    name = type(optimizer).__name__
    bytes_per_element = STATE_BYTES.get(name)
    if bytes_per_element is None:
        try:
            # Step an optimizer of the same class on small CPU weights; return bytes of its states per element
            settings: dict[str, Any] = {
                key: value for key, value in optimizer.defaults.items() if value is not None
            }
            with disable_modes():  # a real step, even during a rehearsal
                small_weights = []
                for weight in optimizer.param_groups[0]["params"][:2]:
                    shape = [min(size, MAX_WEIGHT_SIDE) for size in weight.shape]
                    small_weights.append(Parameter(torch.ones(shape, dtype=weight.dtype)))
                small_optimizer = type(optimizer)(small_weights, **settings)
                for weight in small_weights:
                    weight.grad = torch.ones_like(weight)
                small_optimizer.step()
                size_bytes = sum(tensor.nbytes for tensor in list_states(small_optimizer))
                bytes_per_element = size_bytes / sum(weight.numel() for weight in small_weights)
        except Exception as error:  # a foreign class may raise anything, and must not prevent the plan
            logger.warning(
                "The states of %s cannot be measured (%s); assuming %g bytes per element.",
                name,
                error,
                DEFAULT_STATE_BYTES,
            )
            bytes_per_element = DEFAULT_STATE_BYTES
    return round(bytes_per_element * sum(parameter.numel() for parameter in parameters))


def make_autocast(options: TrainingOptions, device: torch.device) -> Autocast:
    """Return a function that creates the autocast context of --mixed_precision, or a null context."""
    dtype = AUTOCAST.get(options.accelerator.mixed_precision)
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype)


def empty_like_on_device(tensor: Tensor, ledger: dry.Ledger) -> Tensor:
    """Replace a tensor of a batch with an empty one on the device; integer tensors (masks) keep values."""
    if not tensor.is_floating_point():
        return tensor
    with ledger.allocating(dry.BATCH):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=ledger.device)
