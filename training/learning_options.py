"""Options of the trained part, of the optimizer and of its learning rate.

Standard library only. Options of a single network are in networks/options.py.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.shard_options import read_shard_size
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.option_values import int_or_float, read_literals
from modules.options import (
    CHANGEABLE,
    FREE,
    HABIT,
    IDENTITY,
    IMPORTS_CLASS,
    Options,
    not_needed,
    option,
    unsupported,
)
from networks.names.layouts import COMFYUI, DIFFUSERS, KNOWN

logger = logging.getLogger(__name__)

# key in `custom_attributes` of a table: the target of its samples is the base model's prediction
PRESERVE_OUTPUT = "diff_output_preservation"
EVERYTHING = "."  # value of --trainable_modules that selects all weights: it occurs in every name
NO_FROZEN_MODEL = (
    "the model itself is trained, so that there is no frozen one to add a LoRA to, or to learn from. Train a "
    "LoRA instead"
)
MERGED_BEFORE = "merge them into the transformer before it is trained: merge_lora.py --save_merged_model FILE"
HOST = "cpu"  # of --offload_optimizer_device
ONE_FILE = "safetensors"  # of --save_model_as
SHARD_SIZE = "--max_shard_size"
FOLDERS = ("diffusers", "diffusers_safetensors")
NO_CODE = {"ckpt": "a ckpt can hold code"}
_NO_FOLDER = "the trained transformer is one safetensors file, without text encoders and VAE"
_NO_NETWORK = "the transformer itself is trained, without an added network."


class FullDitOptions(Options, title="full fine-tuning"):
    """Options of full fine-tuning: selected weights, their dtype, and how the optimizer updates them."""

    trainable_modules: tuple[str, ...] = option(
        "train only parameters whose name contains one of these, e.g. single_blocks.3. img_mod; . trains all",
        default=(EVERYTHING,),
        nargs="+",
        often=True,
        facts=IDENTITY,
    )
    fused_backward_pass: bool = option(
        "step each weight as soon as its gradient is complete and free the gradient: saves the memory "
        "for all gradients; needs one process, no accumulation, an optimizer such as Adafactor; "
        "--max_grad_norm clips the gradient of each weight separately",
        often=True,
        facts=HABIT,
    )
    offload_optimizer_device: str | None = option(
        "cpu: keep the states of the optimizer in host memory; those of one weight at a time come to the "
        "device, where it is stepped; needs an optimizer such as AdamW",
        choices=(HOST,),
        refused={"nvme": "states are not kept on disk. Memory that the system pages out does the same"},
        facts=FREE,
    )
    full_bf16: bool = option(
        "keep the weights in bf16, half of float32's memory; steps are computed in float32 and rounded "
        "stochastically; needs --mixed_precision bf16",
        facts=IDENTITY,
    )
    full_fp16 = unsupported(
        "weights in fp16 lose most of each step; use --full_bf16, or --mixed_precision fp16 with weights in "
        "float32",
        "keep the weights in fp16",
    )

    save_model_as: str | None = option(
        "form of the trained model; safetensors: one file with the released names",
        choices=(ONE_FILE,),
        refused=dict.fromkeys(FOLDERS, _NO_FOLDER) | NO_CODE,
        facts=FREE,
    )
    max_shard_size: str | None = option(
        "save the trained model as a folder of files of at most this size, such as 5GB, with an index as "
        "diffusers writes it; default: one file",
        metavar="SIZE",
        facts=FREE,
        known_as=("shard_size",),
    )
    training_adapter = unsupported(NO_FROZEN_MODEL, "LoRA in training steps only", metavar="FILE")
    training_adapter_multiplier = unsupported(NO_FROZEN_MODEL, "its strength", type=float)
    network_weights = unsupported(MERGED_BEFORE, "LoRA file to start from", type=str)
    dim_from_weights = not_needed(_NO_NETWORK)
    lora_format = not_needed(_NO_NETWORK, choices=(KNOWN, COMFYUI, DIFFUSERS))
    network_module = not_needed(_NO_NETWORK, type=str)
    network_dim = not_needed(_NO_NETWORK, type=int)
    network_alpha = not_needed(_NO_NETWORK, type=float, default=1)
    network_dropout = not_needed(_NO_NETWORK, type=float)
    network_args = not_needed(_NO_NETWORK, nargs="*")
    scale_weight_norms = not_needed(_NO_NETWORK, type=float)
    mem_eff_save = not_needed("files are always written tensor by tensor.")
    block_swap_optimizer_patch_params = not_needed(
        "the optimizer knows where the parameters of swapped blocks are."
    )

    @property
    def offloads_states(self) -> bool:
        """Return whether the optimizer's states are kept in host memory."""
        return self.offload_optimizer_device == HOST

    @property
    def saves_folders(self) -> bool:
        """Return whether trained models are folders instead of single files."""
        return self.save_model_as in FOLDERS or self.max_shard_size is not None

    @property
    def shard_bytes(self) -> int:
        """Return the maximum size of a saved file in bytes; 0 if saved models are not split into shards."""
        return 0 if self.max_shard_size is None else read_shard_size(SHARD_SIZE, self.max_shard_size)

    def __post_init__(self) -> None:
        if self.max_shard_size is not None:
            read_shard_size(SHARD_SIZE, self.max_shard_size)

    @property
    def name_parts(self) -> tuple[str, ...]:
        """Substrings of the names of the trained weights; empty if all weights are trained."""
        return () if EVERYTHING in self.trainable_modules else self.trainable_modules


class ExpertTrainingOptions(Options, title="two transformers"):
    """Options of models with two transformers: the LoRA of each, and offloading the inactive one."""

    lora_per_expert: bool = option(
        "with --dit and --dit_high_noise: train a network for each and save two files, "
        "..._low_noise.safetensors and ..._high_noise.safetensors; default: one network for both",
        facts=IDENTITY,
    )
    offload_inactive_dit: bool = option(
        "keep the idle transformer in host memory; each step loads the one that it needs"
    )
    network_weights_high_noise: Path | None = option(
        "with --lora_per_expert: LoRA file that the network of --dit_high_noise starts from; "
        "--network_weights is for that of --dit",
        place="there",
    )


# defaults for models with one transformer, whose scripts do not have these options
ONE_DIT = ExpertTrainingOptions()


HIGH_RATE = 0.1  # above this rate, training usually diverges within a few steps
# prefixes of optimizers that find their own rate, for which --learning_rate is a factor near 1; Automagic
# rejects such a rate itself
FIND_RATE = ("prodigy", "dadapt", "adafactor", "came", "automagic")
LARGEST_RATE = 1000.0  # far above any useful rate; larger ones overflow in the first step


class OptimizerOptions(Options, title="optimizer"):
    """The optimizer and its arguments."""

    optimizer_type: str = option(
        "AdamW (when empty), AdamW8bit, Adafactor, Lion, Prodigy, Automagic, AdamWScheduleFree, a "
        "torch.optim class or pkg.module.Class",
        default="",
        often=True,
        facts={**IDENTITY, **IMPORTS_CLASS},
    )
    optimizer_args: tuple[str, ...] | None = option(
        'arguments of the optimizer, e.g. weight_decay=0.01 "betas=0.9,0.95"',
        metavar="KEY=VALUE",
        facts=IDENTITY,
    )
    learning_rate: float = option(
        "step size of the optimizer; 1e-4 is common for a LoRA, 1 for Prodigy",
        default=2.0e-6,
        minimum=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual for a LoRA, 1 for Prodigy; 0 only makes sense if the optimizer finds its rate",
        often=True,
        facts=CHANGEABLE,
    )
    max_grad_norm: float = option(
        "clip the gradient to this norm; 0 turns clipping off",
        default=1.0,
        minimum=0,
        hint="0 turns clipping off",
        facts=HABIT,
    )

    def __post_init__(self) -> None:
        name = self.optimizer_type.rpartition(".")[2].lower()
        if self.learning_rate > HIGH_RATE and not name.startswith(FIND_RATE):
            logger.warning(
                "--learning_rate %g is very high for %s: 1e-4 is usual for a LoRA, and 1 for Prodigy, which "
                "finds its own rate. The network may be lost within a few steps.",
                self.learning_rate,
                self.optimizer_type or "AdamW",
            )
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Parse --optimizer_args into keyword arguments of the optimizer."""
        return read_literals("--optimizer_args", self.optimizer_args) if self.optimizer_args else {}


class PartsOptions(Options, title="what is trained"):
    """Networks that get a LoRA (the DiT, the text encoders, or both), and their learning rates."""

    network_train_unet_only: bool = option(
        "put the network into the transformer only",
        often=True,
        excludes="network_train_text_encoder_only",
        hint="else nothing is trained",
        facts=IDENTITY,
    )
    network_train_text_encoder_only: bool = option(
        "put the network into the text encoders only", facts=IDENTITY
    )
    unet_lr: float | None = option(
        "learning rate of the transformer's network; default: --learning_rate",
        acts_if={"the transformer does not learn": lambda options: options.trains_dit},
        minimum=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )
    text_encoder_lr: tuple[float, ...] | None = option(
        "learning rates of the text encoders' networks, one for all or one for each; default: "
        "--learning_rate",
        acts_if={"the text encoders do not learn": lambda options: options.trains_text_encoders},
        minimum=0,
        below=LARGEST_RATE,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )
    fused_backward_pass: bool = option(
        "step each weight as soon as its gradient is complete and free the gradient; needs one "
        "process, no accumulation, an optimizer such as Adafactor; --max_grad_norm clips the gradient "
        "of each weight separately",
        facts=HABIT,
    )

    @property
    def trains_dit(self) -> bool:
        """Whether the DiT gets a LoRA."""
        return not self.network_train_text_encoder_only

    @property
    def trains_text_encoders(self) -> bool:
        """Whether the text encoders get a LoRA."""
        return not self.network_train_unet_only

    def text_rates(self, count: int, learning_rate: float) -> tuple[float, ...]:
        """Return a learning rate for each text encoder that can be trained.

        A single value applies to all of them; without a value it is --learning_rate.

        Args:
            count: Number of these text encoders.
            learning_rate: Learning rate of the run.

        Raises:
            OptionError: If there are too many values.
        """
        rates = self.text_encoder_lr or (learning_rate,)
        if len(rates) > max(count, 1):
            raise OptionError(
                f"--text_encoder_lr has {len(rates)} values, but {count} text encoders can learn: pass one "
                "value, or one for each"
            )
        # the last rate is repeated; [:count] matters if no encoder can learn
        return (*rates, *[rates[-1]] * (count - len(rates)))[:count]


CURVES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
)
PLATEAU = "plateau"  # lowers the rate by the validation loss
ADAFACTOR = "adafactor"  # or "adafactor:<learning rate>": Adafactor's own steps, shown as a schedule


_WITHOUT_CLASS = {"--lr_scheduler_type replaces it": lambda options: not options.lr_scheduler_type}


def _only_with_schedulers(*curves: str) -> dict[str, Callable[[Any], bool]]:
    """Return the `acts_if` condition of an option that only these learning rate schedules use."""
    why = f"only --lr_scheduler {', '.join(curves)} uses it"
    return {why: lambda options: not options.lr_scheduler_type and options.lr_scheduler in curves}


STEPS_OR_FRACTION_HINT = "steps, or a fraction of the run such as 0.05 or 5%"


class LrScheduleOptions(Options, title="learning-rate schedule"):
    """Options of the learning rate schedule. Steps below 1 are fractions of the run."""

    lr_scheduler: str = option(
        ", ".join((*CURVES, PLATEAU, ADAFACTOR)), default="constant", often=True, acts_if=_WITHOUT_CLASS
    )
    lr_warmup_steps: int | float = option(
        "rise from 0 during these steps; 0.05 or 5%% are fractions of the run",
        default=0,
        type=int_or_float,
        minimum=0,
        hint=STEPS_OR_FRACTION_HINT,
        acts_if={
            **_WITHOUT_CLASS,
            "piecewise_constant has no warm-up": lambda options: options.lr_scheduler != "piecewise_constant",
        },
    )
    lr_decay_steps: int | float = option(
        "length of the decay of warmup_stable_decay; fractions as for --lr_warmup_steps",
        default=0,
        type=int_or_float,
        minimum=0,
        hint=STEPS_OR_FRACTION_HINT,
        acts_if=_only_with_schedulers("warmup_stable_decay"),
    )
    lr_scheduler_num_cycles: int = option(
        "cycles of cosine_with_restarts, cosine_with_min_lr, warmup_stable_decay",
        default=1,
        minimum=1,
        acts_if=_only_with_schedulers("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
    )
    lr_scheduler_power: float = option(
        "power of polynomial", default=1, minimum=0, below=1000, acts_if=_only_with_schedulers("polynomial")
    )
    lr_scheduler_timescale: int | None = option(
        "time scale of inverse_sqrt; default: the warm-up steps",
        minimum=1,
        acts_if=_only_with_schedulers("inverse_sqrt"),
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        "lowest factor of cosine_with_min_lr and warmup_stable_decay",
        minimum=0,
        below=1000,
        acts_if=_only_with_schedulers("cosine_with_min_lr", "warmup_stable_decay"),
    )
    lr_scheduler_type: str = option(
        "a class of torch.optim.lr_scheduler or package.module.Class instead of --lr_scheduler",
        default="",
        facts=IMPORTS_CLASS,
    )
    lr_scheduler_args: tuple[str, ...] | None = option(
        "arguments of the scheduler, e.g. T_max=100", metavar="KEY=VALUE"
    )

    def __post_init__(self) -> None:
        """Raise OptionError if the schedule is unknown, or lacks or rejects one of the given options."""
        arguments = self.arguments()
        if self.lr_scheduler_type:
            return
        name = self.lr_scheduler
        if name.partition(":")[0] == ADAFACTOR:  # adafactor or adafactor:RATE
            self._reject_warmup("Adafactor has warmup_init=True")
        elif name not in (*CURVES, PLATEAU):
            names = (*CURVES, PLATEAU, ADAFACTOR)
            raise OptionError(
                f"--lr_scheduler {name}: unknown.{did_you_mean(name, names)} Use one of {', '.join(names)}, "
                "or pass the import path of a torch scheduler to --lr_scheduler_type."
            )
        if name == "constant":
            self._reject_warmup("Use --lr_scheduler constant_with_warmup")
        if name == "cosine_with_min_lr" and self.lr_scheduler_min_lr_ratio is None:
            raise OptionError(
                "--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, e.g. 0.1 to end at a "
                "tenth"
            )
        if name == "piecewise_constant" and "step_rules" not in arguments:
            raise OptionError(
                "--lr_scheduler piecewise_constant needs --lr_scheduler_args step_rules='1:10,0.1:20,0.01' "
                "(factor:until step, ...)"
            )

    def _reject_warmup(self, remedy: str) -> None:
        """Raise OptionError if --lr_warmup_steps is given with a schedule that has no warm-up."""
        if self.lr_warmup_steps:
            raise OptionError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: --lr_scheduler {self.lr_scheduler} has no "
                f"warm-up. {remedy}."
            )

    def arguments(self) -> dict[str, Any]:
        """Parse --lr_scheduler_args into keyword arguments of the scheduler."""
        return read_literals("--lr_scheduler_args", self.lr_scheduler_args) if self.lr_scheduler_args else {}
