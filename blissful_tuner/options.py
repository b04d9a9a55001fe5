"""Options of guidance, prompts, previews, longer videos and step caches. Standard library only."""

import logging
from pathlib import Path

from modules.errors import OptionError
from modules.options import BY_SCRIPT, NO_PIXELS, Options, option

logger = logging.getLogger(__name__)

MAX_NAG = 100  # products with scales of several hundred overflow in float16


NAG = "normalized attention guidance (NAG)"


class NagOptions(Options, title=NAG):
    """Options of normalized attention guidance, which steers attention away from --nag_prompt."""

    nag_scale: float | None = option(
        "steer attention away from --nag_prompt, with or without --guidance_scale; 4 to 11 are common, "
        "1 turns it off",
        minimum=1,
        maximum=MAX_NAG,
        hint="1 is off, 4 to 11 are usual",
    )
    nag_tau: float = option(
        "maximum factor by which --nag_scale may enlarge the attention output of a token; larger "
        "outputs are scaled back",
        default=3.5,
        above=0,
        ignored_without="nag_scale",
        hint="2.5 to 5 are usual",
    )
    nag_alpha: float = option(
        "fraction of the steered attention in the result, 0 to 1",
        default=0.5,
        minimum=0,
        maximum=1,
        ignored_without="nag_scale",
        hint="0 is off",
    )

    @property
    def is_on(self) -> bool:
        """Return whether attention is modified at all: it is not with scale 1 or alpha 0."""
        return self.nag_scale not in (None, 1) and self.nag_alpha != 0


MAX_SCALE = 1000  # maximum guidance scale, and maximum of every other factor here
DEFAULT_SLG = 3.0
CFG_SKIP_MODES = ("early", "late", "middle", "early_late", "alternate", "none")


class GuidanceOptions(Options, title="guidance"):
    """Options of classifier-free guidance, except its scale."""

    nag: NagOptions
    cfg_skip_mode: str = option(
        "steps that run without guidance, to save time",
        default="none",
        choices=CFG_SKIP_MODES,
        needs="cfg_apply_ratio",
        hint="the fraction of the steps with guidance",
    )
    cfg_apply_ratio: float | None = option(
        "with --cfg_skip_mode: fraction of the steps that keep guidance, 0 to 1",
        minimum=0,
        maximum=1,
        ignored_without="cfg_skip_mode",
    )
    slg_mode: str | None = option(
        "skip-layer guidance: original adds a third pass that skips the layers, uncond skips them in the "
        "negative pass",
        choices=("original", "uncond"),
        ignored_without="slg_layers",
    )
    slg_layers: str | None = option("numbers of the blocks to skip, e.g. 9,10", ignored_without="slg_mode")
    slg_scale: float = option(
        "strength of --slg_mode original",
        default=DEFAULT_SLG,
        minimum=-MAX_SCALE,
        maximum=MAX_SCALE,
        ignored_without="slg_mode",
        hint="3 is usual",
    )
    slg_start: float = option(
        "fraction of the steps at which it begins",
        default=0.0,
        minimum=0,
        maximum=1,
        ignored_without="slg_mode",
    )
    slg_end: float = option(
        "fraction of the steps at which it ends",
        default=0.3,
        minimum=0,
        maximum=1,
        ignored_without="slg_mode",
    )
    cfgzerostar_scaling: bool = option(
        "CFG-Zero*: scale the negative prediction to fit the positive one; no extra pass"
    )
    cfgzerostar_init_steps: int = option(
        "CFG-Zero*: number of first steps whose prediction is multiplied by --cfgzerostar_multiplier; "
        "2 for text-to-video and 1 for image-to-video are common, -1 is none",
        default=-1,
        minimum=-1,
        hint="1 or 2 are usual, -1 turns it off",
    )
    cfgzerostar_multiplier: float = option(
        "with --cfgzerostar_init_steps: the factor; 0 skips the passes of these steps",
        default=0.0,
        minimum=-MAX_SCALE,
        maximum=MAX_SCALE,
        ignored_without="cfgzerostar_init_steps",
        hint="0 is usual",
    )
    perp_neg: float | None = option(
        "perpendicular negative guidance: weight of what the negative prompt does not share with the "
        "prompt; 1.5 to 2 are common; one extra pass, for the empty prompt",
        minimum=-MAX_SCALE,
        maximum=MAX_SCALE,
        excludes="cfgzerostar_scaling",
        hint="1.5 to 2 are usual",
        why="it replaces the formula of guidance",
    )
    guidance_rescale: float = option(
        "fraction of the standard deviation added by guidance that is removed, 0 to 1: against "
        "oversaturated images",
        default=0.0,
        minimum=0,
        maximum=1,
    )
    disable_embedded_for_cfg: bool = option(
        "at steps with guidance, call the model without its embedded guidance"
    )

    def __post_init__(self) -> None:
        if self.slg_mode is not None:
            parse_layers(self.slg_layers)
        if self.slg_mode == "uncond" and self.slg_scale != DEFAULT_SLG:
            logger.warning("--slg_scale %g is ignored because it is for --slg_mode original", self.slg_scale)
        if self.perp_neg is not None and self.slg_mode == "original" and self.skipped_layers:
            raise OptionError(
                "--perp_neg and --slg_mode original cannot be used together. Use --slg_mode uncond, or omit "
                "one of them"
            )

    @property
    def skipped_layers(self) -> frozenset[int]:
        """Indices of the blocks that skip-layer guidance skips; empty without it."""
        return frozenset() if self.slg_mode is None else parse_layers(self.slg_layers)

    @property
    def scaled_steps(self) -> int:
        """Return for how many initial steps CFG-Zero* scales the velocity; 0 if the factor is 1."""
        return max(self.cfgzerostar_init_steps, 0) if self.cfgzerostar_multiplier != 1 else 0


def parse_layers(text: str | None) -> frozenset[int]:
    """Return the block indices in --slg_layers, such as "9,10"; none for None or an empty string.

    Raises:
        OptionError: If the text is not a list of numbers.
    """
    try:
        # a trailing comma is allowed
        layers = frozenset(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise OptionError(
            f"--slg_layers {text!r}: use block numbers separated by commas, such as 9,10"
        ) from None
    if any(layer < 0 for layer in layers):
        raise OptionError(f"--slg_layers {text!r}: blocks are counted from 0")
    return layers


# for training samples: guidance at every step, nothing else
PLAIN_GUIDANCE = GuidanceOptions.from_defaults()


class PromptOptions(Options, title="prompts"):
    """Options to process a video's prompts: wildcards and prompt weights."""

    prompt_wildcards: Path | None = option(
        "folder of text files: __name__ in a prompt becomes a line of name.txt, drawn by the seed",
        place="folder",
        hint="the folder of the text files that __name__ in a prompt draws from",
    )
    prompt_alternatives: bool = option(
        "{red|blue} in a prompt becomes one of them, drawn by the seed; {3::red|blue} draws red 3 times as "
        "often"
    )
    prompt_weighting: bool = option(
        "(word:1.4) in a prompt multiplies the model's input for that part; (word) means 1.1, "
        "\\( a parenthesis"
    )


PLAIN_PROMPTS = PromptOptions()


MODES = ("normal", "master")


class PromptRewriteOptions(Options, title="prompts that a chat model rewrites"):
    """Options to rewrite prompts with a chat model before they are encoded."""

    # not recorded: outputs record the rewritten text instead
    prompt_rewrite: str | None = option(
        "have a chat model describe what the prompt asks for, in English: normal keeps every detail, master "
        "adds composition, light and camera",
        choices=MODES,
        facts=NO_PIXELS,
        needs="prompt_rewrite_model",
        hint="the folder of a chat model",
    )
    prompt_rewrite_model: Path | None = option(
        "folder of the chat model",
        facts=NO_PIXELS,
        needs="prompt_rewrite",
        hint="normal or master",
    )

    def __post_init__(self) -> None:
        model = self.prompt_rewrite_model
        if model is not None and not (model / "config.json").is_file():
            raise OptionError(
                f"--prompt_rewrite_model {model}: no folder with a config.json. Pass the folder of a chat "
                "model in the layout of transformers"
            )


class PreviewOptions(Options, title="previews"):
    """Options of latent previews: when to show one, and how to decode it."""

    preview_latent_every: int | None = option(
        "every N steps, show the clip as it will probably look, in latent_preview.mp4 or .png in "
        "--save_path; counts sections if a clip is made in several (FramePack)",
        minimum=1,
        hint="omit it for no previews",
    )
    preview_vae: Path | None = option(  # None: a linear map from latents to colors
        "small VAE (TAEHV: taew2_1 for Wan, taehv for HunyuanVideo and others with its VAE, taehv1_5 for "
        "HunyuanVideo 1.5) for previews that are sharp and have all frames; default: blurred colors, at no "
        "cost",
        needs="preview_latent_every",
        place="there",
        hint="a TAEHV file, or omit it for previews without one",
    )


NO_PREVIEW = PreviewOptions()


# help text with placeholders for the kind of videos and the number of frequencies
RIFLEX = (
    "RIFLEx, against repetition in long videos{}: which frequency of the frames' positions is slowed down, "
    "1 to {}; 0 turns it off. Its period becomes 1.1 times the number of frames, as in other tools "
    "(the paper counts latent frames)"
)


class SteadierOptions(Options, title="longer videos"):
    """Options that slow down one temporal frequency of the rotary embedding, to extend videos."""

    riflex_index: int = option(  # from 1; 0: none
        RIFLEX,
        default=0,
    )
    # set by the script for its family; not on the command line. The second is a number of frames: shorter
    # videos are not changed
    riflex_frequencies: int = option(default=0, facts={**NO_PIXELS, **BY_SCRIPT})
    riflex_beyond: int = option(default=0, facts={**NO_PIXELS, **BY_SCRIPT})

    def __post_init__(self) -> None:
        if not 0 <= self.riflex_index <= self.riflex_frequencies:
            raise OptionError(
                f"--riflex_index {self.riflex_index}: the model has {self.riflex_frequencies} frequencies "
                "for the positions of frames. Use a number from 1 to "
                f"{self.riflex_frequencies}, or 0 for none"
            )


RETENTION, THRESHOLD, MAX_SKIPS = 0.2, 0.24, 6  # usual values of --magcache_...
MAX_RATIO = 100  # larger values are typing mistakes
MAX_COEFFICIENTS = 16
NOTHING_SKIPPED = "0 skips nothing"
COMPUTES_ALL = "a calibration computes every step, a cache skips some"


class StepCacheOptions(Options, title="step caches: skip passes that resemble those before"):
    """Which step cache to use; `blissful_tuner.step_cache.select_step_cache` adds values of a prompt line."""

    magcache_mag_ratios: tuple[float, ...] | None = option(  # None: no MagCache
        "skip by MagCache, with these ratios as --magcache_calibration prints them; they are resampled to "
        "the number of steps",
        metavar="RATIO",
        excludes="teacache_threshold",
        hint="MagCache and TeaCache both decide which steps are skipped",
    )
    magcache_retention_ratio: float = option(
        f"fraction of the steps, from the first, in which nothing is skipped; default {RETENTION:g}",
        default=RETENTION,
        minimum=0,
        maximum=1,
        ignored_without="magcache_mag_ratios",
    )
    magcache_threshold: float = option(
        "largest error of passes skipped in a row: higher is faster and further from the plain video; "
        f"default {THRESHOLD:g}",
        default=THRESHOLD,
        minimum=0,
        hint=NOTHING_SKIPPED,
        ignored_without="magcache_mag_ratios",
    )
    magcache_k: int = option(
        f"largest number of passes skipped in a row; default {MAX_SKIPS}",
        default=MAX_SKIPS,
        minimum=0,
        hint=NOTHING_SKIPPED,
        ignored_without="magcache_mag_ratios",
    )
    magcache_calibration: bool = option(
        "skip nothing, and print --magcache_mag_ratios as measured",
        facts=NO_PIXELS,
        excludes=("magcache_mag_ratios", "teacache_threshold", "teacache_calibration"),
        hint=COMPUTES_ALL,
    )
    teacache_threshold: float | None = option(  # None and 0: no TeaCache
        "skip by TeaCache until the predicted change reaches this: 0.1 to 0.15 with the published "
        "coefficients; higher is faster and further from the plain video",
        minimum=0,
        hint=NOTHING_SKIPPED,
    )
    teacache_coefficients: tuple[float, ...] | None = option(
        "polynomial that predicts the change, highest power first; default: the model's published one, if "
        "any",
        nargs="+",
        metavar="NUMBER",
        ignored_without="teacache_threshold",
    )
    teacache_calibration: bool = option(
        "skip nothing, and print --teacache_coefficients as fitted",
        facts=NO_PIXELS,
        excludes=("magcache_mag_ratios", "teacache_threshold"),
        hint=COMPUTES_ALL,
    )

    def __post_init__(self) -> None:
        if self.magcache_mag_ratios in ((), (0.0,)):
            raise OptionError(
                "--magcache_mag_ratios 0 means built-in ratios, and there are none for this model: calibrate "
                "first. Run the command once with --magcache_calibration instead, which prints the option to "
                "give"
            )
        for ratio in self.magcache_mag_ratios or ():
            if not 0 < ratio <= MAX_RATIO:
                raise OptionError(
                    f"--magcache_mag_ratios {ratio:g}: use numbers above 0, one for each step of the "
                    "calibration, as --magcache_calibration prints them"
                )
        coefficients = self.teacache_coefficients
        if coefficients is not None and not 1 <= len(coefficients) <= MAX_COEFFICIENTS:
            raise OptionError(
                f"--teacache_coefficients: pass 1 to {MAX_COEFFICIENTS} numbers, highest power first, as "
                "--teacache_calibration prints them"
            )

    @property
    def is_on(self) -> bool:
        """Return whether a step cache skips or measures passes."""
        measures = self.magcache_calibration or self.teacache_calibration
        return measures or bool(self.magcache_mag_ratios or self.teacache_threshold)
