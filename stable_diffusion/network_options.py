"""Options of LoRAs and their like. Standard library only."""

from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from networks.options import multipliers_for, require_files

# of known scripts, for files that say themselves what they are; our own modules are read in the same way
KNOWN_MODULES = (
    *("networks.lora", "networks.loha", "networks.lokr", "networks.lora_fa", "networks.dylora"),
    *("lycoris", "lycoris.kohya"),
)
NOT_READ = {"networks.oft": "OFT", "networks.control_net_lllite": "a ControlNet-LLLite"}


class AddedNetworkOptions(Options, title="LoRA and other networks"):
    """LoRAs and their like, in the order of their weights."""

    network_module: tuple[str, ...] | None = option(
        "kinds of the files, such as networks.lora; needless, as the files say what they are",
        needs="network_weights",
    )
    network_weights: tuple[Path, ...] | None = option("LoRA files, any dialect", often=True)
    network_mul: tuple[float, ...] | None = option(
        "strength of each file; default: 1", needs="network_weights", often=True
    )
    network_args: tuple[str, ...] | None = option(
        "arguments of each module: key=value, several joined by ;. The files say the same",
        needs="network_weights",
    )
    network_show_meta: bool = option("show what the files say of themselves", needs="network_weights")
    network_merge: bool = option(
        "fold all networks into the model, which is faster",
        needs="network_weights",
        excludes=("network_merge_n_models", "network_pre_calc"),
    )
    network_merge_n_models: int | None = option(
        "fold the first ones into the model", least=1, needs="network_weights"
    )
    network_pre_calc: bool = option(
        "fold the networks in for each batch, which is faster than adding them at each step and still lets "
        "prompts choose strengths (--am)",
        needs="network_weights",
    )
    network_regional_mask_max_color_codes: int | None = option(
        "the mask of regions (--mask_path, prompts with AND) has this many regions, each of one colour: red "
        "1, green 2, yellow 3, blue 4, magenta 5, cyan 6, white 7; usually red, green and blue are a region "
        "each, and their values weights",
        least=1,
        most=7,
        excludes=("network_merge", "network_pre_calc"),
        hint="networks in regions are added while pictures are made",
    )

    def __post_init__(self) -> None:
        require_files("--network_weights", self.files)
        self._check_modules()
        self._check_counts()
        multipliers_for(self.files, self.network_mul or (), "--network_mul")

    def _check_modules(self) -> None:
        for name in self.network_module or ():
            what = NOT_READ.get(name)
            if what is not None:
                use = "--control_net_lllite_models takes it" if "LLLite" in what else "it is not supported"
                raise OptionError(f"--network_module {name} is for {what}: {use}. Leave --network_module out")
            if name not in KNOWN_MODULES and not name.startswith("networks.lora"):
                raise OptionError(
                    f"--network_module {name}: modules of others are not supported in gen_img.py. Leave "
                    f"--network_module out, or give one of {', '.join(KNOWN_MODULES)}: the files are "
                    "recognised by their tensors"
                )

    def _check_counts(self) -> None:
        files = len(self.files)
        modules = len(self.network_module or ())
        if modules > 1 and modules != files:
            raise OptionError(
                f"--network_module has {modules} names for {files} files of --network_weights: give one for "
                "each, or leave it out"
            )
        for flag, given in (("--network_mul", self.network_mul), ("--network_args", self.network_args)):
            if len(given or ()) > files:
                raise OptionError(
                    f"{flag} has {len(given or ())} values for {files} files of --network_weights: give at "
                    "most one for each, in the same order"
                )
        if (self.network_merge_n_models or 0) > files:
            raise OptionError(
                f"--network_merge_n_models {self.network_merge_n_models}: there are {files} --network_weights"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        return self.network_weights or ()

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Strength of each file."""
        return multipliers_for(self.files, self.network_mul or (), "--network_mul")

    @property
    def num_merged(self) -> int:
        """How many of the files, from the first, are folded into the model for good."""
        return len(self.files) if self.network_merge else self.network_merge_n_models or 0

    @property
    def num_adjustable(self) -> int:
        """How many of the files have strengths that a prompt may choose (--am)."""
        return len(self.files) - self.num_merged

    def check_strengths(self, multipliers: Sequence[float]) -> None:
        """Raise OptionError if a prompt chooses more strengths than there are networks to choose them for."""
        if len(multipliers) > self.num_adjustable > 0:
            merged = (
                f", without the {self.num_merged} that are folded into the model" if self.num_merged else ""
            )
            raise OptionError(
                f"--am has {len(multipliers)} strengths for {self.num_adjustable} networks: give one for "
                f"each of --network_weights, in the same order{merged}"
            )
        multipliers_for(self.files, multipliers, "--am")
