"""Build what learns in a run, and what steps it."""

import logging

from torch import nn

from modules.offload.block_swap import HostWeights
from networks.adapter import make_network
from training.averages import make_average
from training.dressing import dress
from training.job import TrainingJob
from training.optimizers.fused_backward import FusedBackward
from training.optimizers.lr_schedule import make_lr_schedule
from training.optimizers.optimizer import make_optimizer, set_training
from training.optimizers.parameter_steps import ParameterSteps, steps_alone
from training.resuming import Learning
from training.trainable import Trainable, train_dit
from training.trainable import train_network as as_trainable
from training.triggers import TriggerFiles, trigger_paths

logger = logging.getLogger(__name__)


def make_trainable(job: TrainingJob, dit: nn.Module) -> Trainable:
    """Put the network into the DiT, or choose what of the DiT itself learns."""
    options = job.options
    if options.network is None:
        assert options.whole_dit is not None  # one of the two is there
        return train_dit(dit, options.optimizer.learning_rate, options.whole_dit.name_parts)
    network = make_network(options.network, job.family.lora_module, dit, job.progress.seed)
    max_norm = options.network.scale_weight_norms
    return as_trainable(network, options.optimizer.learning_rate, max_norm, job.accelerator.device)


def make_learning(
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


def make_steps(job: TrainingJob, learning: Learning) -> tuple[ParameterSteps | None, FusedBackward | None]:
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


def watch_files(job: TrainingJob, can_sample: bool) -> TriggerFiles:
    """Watch for files that ask for samples or a save (--sample_now), in the main process."""
    if not (job.options.samples.sample_now and job.accelerator.is_main_process):
        return TriggerFiles()
    return TriggerFiles(trigger_paths(job.output_dir, job.output_name), can_sample)
