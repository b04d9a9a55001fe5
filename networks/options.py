"""Options to train a network. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.option_values import split_pairs
from modules.options import FREE, HABIT, IDENTITY, IMPORTS_MODULE, Options, option
from networks.kinds import KINDS, LORA
from networks.kinds.composing import SWITCHES, get_module_kind
from networks.kinds.contract import NetworkKind, named
from networks.names.layouts import COMFYUI, DIFFUSERS, KNOWN
from networks.use_options import MAX_MULTIPLIER

_MODULES = [
    f"{kind.network_module} ({kind.size.note})" if kind.size.note else kind.network_module
    for kind in KINDS
    if kind.network_module
]
_DROPOUTS = "".join(f"; {kind.dropout_note}" for kind in KINDS if kind.dropout_note)
# reasons why --network_alpha does nothing, by kind
_WITHOUT_ALPHA: Mapping[str, Any] = {
    f"{named(kind)} has no alpha": lambda typed: not typed.kind.rotates for kind in KINDS if kind.rotates
}


class FrozenModelOptions(Options, title="frozen model"):
    """Options for changes of the frozen model that are active only in training steps."""

    training_adapter: Path | None = option(
        "LoRA file that is applied only in training steps, such as one that reverses a distillation; "
        "samples, the validation loss and saved files do not include it",
        place="there",
        facts=FREE,
    )
    training_adapter_multiplier: float = option(
        "strength of --training_adapter",
        default=1.0,
        minimum=-MAX_MULTIPLIER,
        maximum=MAX_MULTIPLIER,
        needs="training_adapter",
        hint="1 is usual",
        facts=FREE,
    )


NOTHING_FROZEN = FrozenModelOptions()


class NetworkOptions(Options, title="network"):
    """Options for the network that `--network_module` builds and trains."""

    network_module: str | None = option(
        f"module that builds the network: {', '.join(_MODULES)}, or another package's, such as "
        "lycoris.kohya; default: the family's LoRA",
        often=True,
        facts={**IDENTITY, **IMPORTS_MODULE},
    )
    network_dim: int | None = option(
        f"rank of the network; default {LORA.size.default}",
        minimum=1,
        hint="the rank",
        acts_if={"--dim_from_weights takes ranks from the file": lambda typed: not typed.dim_from_weights},
        often=True,
        facts=IDENTITY,
    )
    network_alpha: float = option(
        "strength is alpha / rank; 0 means alpha = rank",
        default=1,
        minimum=0,
        maximum=1_000_000,
        hint="0 means alpha = rank",
        acts_if={
            "the alphas in the file of --network_weights count": lambda typed: typed.network_weights is None,
            **_WITHOUT_ALPHA,
        },
        often=True,
        facts=IDENTITY,
    )
    network_dropout: float | None = option(
        f"fraction of the values between the two factors that is set to zero during training{_DROPOUTS}",
        minimum=0,
        below=1,
        facts=HABIT,
    )
    network_args: tuple[str, ...] | None = option(
        "additional settings, e.g. rank_dropout=0.1 \"exclude_patterns=[r'.*ffn.*']\"",
        metavar="KEY=VALUE",
        facts=IDENTITY,
    )
    network_weights: Path | None = option(
        "LoRA file to start from; parts that do not fit are logged", place="there", facts=FREE
    )
    dim_from_weights: bool = option(
        "take the rank and alpha of each module from --network_weights", needs="network_weights", facts=FREE
    )
    scale_weight_norms: float | None = option(
        "maximum norm of a module: larger norms are scaled down after each step (1 is a good start)",
        above=0,
        hint="omit it for no limit",
        facts=HABIT,
    )
    lora_format: str | None = option(
        "layer names in saved files. known: those of musubi-tuner and sd-scripts (lora_unet_..., with "
        "alphas); comfyui: those of ComfyUI; diffusers: those of the pipelines of diffusers. Default: "
        "known, for LTX-2 comfyui, which are the names of its official code. All scripts read every "
        "format",
        choices=(KNOWN, COMFYUI, DIFFUSERS),
        facts=FREE,
    )
    frozen: FrozenModelOptions

    def __post_init__(self) -> None:
        self.arguments()

    def arguments(self) -> dict[str, str]:
        """Return --network_args as a dictionary of strings."""
        if not self.network_args:
            return {}
        return {key: value.strip() for key, value in split_pairs("--network_args", self.network_args).items()}

    @property
    def variants(self) -> list[NetworkKind]:
        """Return the network kinds, such as DoRA, that switches in --network_args enable."""
        arguments = self.arguments()
        return [kind for switch, kind in SWITCHES.items() if arguments.get(switch, "").lower() == "true"]

    @property
    def kind(self) -> NetworkKind:
        """Return the network kind (LoRA, ...) that --network_module trains."""
        return get_module_kind(self.network_module)

    @property
    def kinds(self) -> list[NetworkKind]:
        """Return the enabled variants, and the kind that --network_module trains."""
        return [*self.variants, self.kind]

    @property
    def rank(self) -> int:
        """Return --network_dim or the kind's default; for some kinds a block size, not a rank."""
        return self.network_dim or self.kind.size.default

    @property
    def decomposes(self) -> bool:
        """Return whether weight norms are trained (DoRA), starting from the merged weights."""
        return any(kind.magnitudes for kind in self.variants)
