"""Options of the trained part: the whole DiT, or networks of several transformers.

Standard library only. Those of a single network are in networks/options.py.
"""

from pathlib import Path

from modules.errors import OptionError
from modules.options import FREE, HABIT, IDENTITY, Options, option, unsupported
from networks.options import multipliers_for, require_files

EVERYTHING = "."  # occurs in every name


class WholeDitOptions(Options, title="full fine-tuning"):
    """Which weights of the DiT are trained, in which dtype they are kept, and when they are stepped."""

    trainable_modules: tuple[str, ...] = option(
        "train only parameters whose name contains one of these, e.g. single_blocks.3. img_mod; . trains all",
        default=EVERYTHING,
        nargs="+",
        often=True,
        facts=IDENTITY,
    )
    fused_backward_pass: bool = option(
        "step each weight as soon as its gradient is complete and free the gradient: saves the memory "
        "for all gradients; needs one process, no accumulation, an optimizer such as Adafactor; "
        "--max_grad_norm clips each weight's gradient by itself",
        often=True,
        facts=HABIT,
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

    @property
    def name_parts(self) -> tuple[str, ...]:
        """Return `trainable_modules`; empty if everything is trained."""
        return () if EVERYTHING in self.trainable_modules else self.trainable_modules


class ExpertTrainingOptions(Options, title="two transformers"):
    """Trained parts of each transformer, and where one waits while another works."""

    lora_per_expert: bool = option(
        "with --dit and --dit_high_noise: train a network for each and save two files, "
        "..._low_noise.safetensors and ..._high_noise.safetensors; default: one network for both",
        facts=IDENTITY,
    )
    offload_inactive_dit: bool = option(
        "keep the transformer that does not work in host memory; each step brings the one that it needs",
        facts=FREE,
    )
    network_weights_high_noise: Path | None = option(
        "with --lora_per_expert: LoRA file that the network of --dit_high_noise starts from; "
        "--network_weights is for that of --dit",
        facts=FREE,
    )
    base_weights_high_noise: tuple[Path, ...] | None = option(
        "LoRA files added to --dit_high_noise before training; default: those of --base_weights. If "
        "given, --base_weights is for --dit only",
        facts=FREE,
    )
    base_weights_multiplier_high_noise: tuple[float, ...] | None = option(
        "strength of each file of --base_weights_high_noise; missing ones are 1", facts=FREE
    )

    def __post_init__(self) -> None:
        start = self.network_weights_high_noise
        require_files("--network_weights_high_noise", [start] if start else [])
        require_files("--base_weights_high_noise", self.base_weights_high_noise or ())
        if self.base_weights_high_noise is not None and not self.base_weights_high_noise:
            raise OptionError("--base_weights_high_noise has no file behind it: give one, or leave it out")
        self.base_multipliers()

    def base_multipliers(self) -> tuple[float, ...]:
        """Return one multiplier for each of `--base_weights_high_noise`; missing ones are 1."""
        option = "--base_weights_multiplier_high_noise"
        files, given = self.base_weights_high_noise or (), self.base_weights_multiplier_high_noise or ()
        return multipliers_for(files, given, option)


# of models with one transformer, whose scripts do not have these options
ONE_DIT = ExpertTrainingOptions.usual()
