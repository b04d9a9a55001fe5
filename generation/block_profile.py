"""Measure what each block of a LoRA does to the prediction: every block is left out in turn while denoising.

The LoRA is added by wrapping the layers of the loaded network, so that a block is left out without loading
anything again. At some steps of each prompt, the network predicts with the whole LoRA, without the LoRA, and
without each block; the clip is denoised with the whole LoRA.
"""

import html
import json
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from generation.comparing import check_options, make_run, prepare_options
from generation.denoise import predictor
from generation.making import make_outputs
from generation.network_setup import DitLoader, LorasByExpert, dit_loader, expert_loras
from generation.options import GenerationOptions
from generation.prompt_lines import read_prompt_lines
from generation.request import make_job, map_lines
from generation.run import check_loras, check_models, explain_lack
from generation.script_options import NOTHING
from modules.atomic_write import write_text
from modules.console import format_count
from modules.control_codes import escape_control_codes
from modules.devices import Failures, get_compute_dtype, select_device
from modules.errors import OptionError
from modules.options import Options, option
from networks.block_changes import get_block_order, list_block_changes, name_block
from networks.delta import read_deltas
from networks.gated_loras import AddedLoras, LoraWrapper, add_loras, reject_magnitudes
from networks.loading import WeightedLora, select_network_part
from networks.names.layouts import OURS
from networks.text_loras import TextLoras, add_lora_words
from protocols.family import Family
from protocols.rules import expert_at
from protocols.steps import CompletedStep, Section

logger = getLogger(__name__)
NUM_LEVELS = 6  # noise levels at which blocks are left out
MAX_SHOWN_FRAMES = 12  # latent frames with a column in the terminal
AUDIO = -1  # key of a clip's audio, among the indices of its latent frames
STDOUT = "-"


class ProfileOptions(Options, title="profile"):
    """Options of tools/profile_blocks.py."""

    family: str | None = option("family of the model; default: as the LoRA says")
    lora: Path = option("LoRA file to measure", required=True, place="there")
    lora_high_noise: Path | None = option(
        "of models with two experts the LoRA file for --dit_high_noise; --lora then is for --dit",
        place="there",
    )
    lora_multiplier: float = option("strength of the LoRA", default=1.0)
    json: Path | None = option(
        "write the figures as JSON; without PATH, or with -, to standard output",
        nargs="?",
        const=STDOUT,
        place="new file",
    )
    chart: Path | None = option("write a chart by block, noise level and frame, as SVG", place="new file")


@dataclass
class LevelProfile:
    """What was measured at one noise level: squared norms, summed over the prompts."""

    sigmas: list[float] = field(default_factory=list)  # of each prompt's step
    prediction: float = 0.0  # of the prediction without the LoRA
    # latent frame (or AUDIO) -> squared norm of what the LoRA changes of the prediction
    change: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    # block -> the same for what leaving out the block changes
    change_by_block: defaultdict[str, defaultdict[int, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )


@dataclass(frozen=True)
class BlockProfile:
    """Shares of a LoRA's effect by block: what is lost without the block, as a fraction of the whole."""

    sigmas: Sequence[float]  # mean noise level of each column
    changes: Sequence[float]  # change of the prediction by the LoRA / the prediction, by noise level
    shares: Mapping[str, Sequence[float]]  # block -> share by noise level
    frames: Sequence[int]  # latent frames; empty for a single image
    shares_of_frames: Mapping[str, Sequence[float]]  # block -> share by frame, over all noise levels
    norms: Mapping[str, float]  # block -> norm of the change of its weights


class BlockRecorder:
    """Loads networks with a LoRA around their layers, and measures each block at some steps."""

    def __init__(self, family: Family, loader: DitLoader, loras: LorasByExpert) -> None:
        self.levels: list[LevelProfile] = []
        self._family = family
        self._loader = loader
        self._loras = loras
        # networks by expert, not kept alive here; the wrappers of each block are an attribute of the network
        self._networks: dict[int, weakref.ref[nn.Module]] = {}

    def load(self, expert: int) -> nn.Module:
        """Load an expert without the LoRA, and wrap its layers with the LoRA, switched on."""
        dit = self._loader(expert)
        uses = select_network_part(self._loras[expert], selects_text_encoders=False)
        added = add_loras(dit, uses, option="--lora")
        added.place_on(self._loader.device, get_compute_dtype(dit))
        layers_by_block: dict[str, list[LoraWrapper]] = {}
        for layer in added.layers:
            layer.is_on = True
            block = name_block(OURS + layer.module_path.replace(".", "_"))
            layers_by_block.setdefault(block, []).append(layer)
        # not by setattr, so that they are not registered as submodules
        dit.__dict__["_profiled_blocks"] = {
            block: AddedLoras(layers) for block, layers in layers_by_block.items()
        }
        self._networks[expert] = weakref.ref(dit)
        return dit

    def measure(self, completed: CompletedStep) -> bool:
        """Measure all blocks at a step if it is one of the chosen steps; False continues denoising."""
        step, section = completed.step, completed.section
        chosen = select_steps(step.num_steps)
        if section.stage or step.index not in chosen:  # later stages refine the result of the first one
            return False
        index = chosen.index(step.index)
        while len(self.levels) <= index:
            self.levels.append(LevelProfile())
        level = self.levels[index]
        dit = self._networks[expert_at(step.timestep, self._family.experts)]()
        assert dit is not None, "it has just been used"
        blocks: Mapping[str, AddedLoras] = dit.__dict__["_profiled_blocks"]
        whole = AddedLoras([layer for block in blocks.values() for layer in block.layers])
        is_joint = section.overrides.audio_video_shapes is not None
        predict = predictor(
            self._family,
            lambda _: dit,
            step,
            split=True,
            all_passes=section.overrides,
            clean_streams=section.clean_streams if is_joint else (False, False),
        )

        def predict_velocity() -> Tensor:
            """Return the velocity for the prompt without guidance; fixed latents have their own."""
            (velocity,) = predict(section.positive)
            if section.fixed_latents is not None:
                return section.fixed_latents.mix_prediction(step, velocity.float())
            return velocity.float()

        with_lora = predict_velocity()
        with whole.switched_to(False):
            without_lora = predict_velocity()
        level.sigmas.append(step.sigma)
        level.prediction += sum(_sum_squares(section, without_lora).values())
        _add_squares(level.change, section, with_lora - without_lora)
        for block, layers in blocks.items():
            with layers.switched_to(False):
                _add_squares(level.change_by_block[block], section, with_lora - predict_velocity())
        return False

    def make_profile(self, norms: Mapping[str, float]) -> BlockProfile:
        """Return the shares of all blocks; `norms` are those of the changes of their weights."""
        names = {block for level in self.levels for block in level.change_by_block}
        blocks = sorted(names, key=get_block_order)
        frames = sorted({frame for level in self.levels for frame in level.change} - {AUDIO})
        totals = [sum(level.change.values()) for level in self.levels]
        total_of_frames = [sum(level.change[frame] for level in self.levels) for frame in frames]
        shares = {}
        shares_of_frames = {}
        for block in blocks:
            squares = [level.change_by_block[block] for level in self.levels]
            sums = [sum(by_frame.values()) for by_frame in squares]
            sums_of_frames = [sum(by_frame[frame] for by_frame in squares) for frame in frames]
            shares[block] = _divide(sums, totals)
            shares_of_frames[block] = _divide(sums_of_frames, total_of_frames)
        return BlockProfile(
            sigmas=[sum(level.sigmas) / len(level.sigmas) for level in self.levels],
            changes=_divide(totals, [level.prediction for level in self.levels]),
            shares=shares,
            frames=frames if len(frames) > 1 else (),
            shares_of_frames=shares_of_frames if len(frames) > 1 else {},
            norms={block: norms[block] for block in blocks if block in norms},
        )


def measure_block_norms(uses: Iterable[WeightedLora]) -> dict[str, float]:
    """Return the norm of what LoRAs at their strengths change in the weights of each block."""
    squared_norms: defaultdict[str, float] = defaultdict(float)
    for use in uses:
        for change in list_block_changes(read_deltas(use.lora.modules())):
            squared_norms[change.block] += change.squared_norm * use.multiplier**2
    return {block: squared_norm**0.5 for block, squared_norm in squared_norms.items()}


def select_steps(num_steps: int) -> list[int]:
    """Return the steps at which blocks are left out: the first, the last, and evenly spaced ones between."""
    count = min(NUM_LEVELS, num_steps)
    return [round(index * (num_steps - 1) / max(count - 1, 1)) for index in range(count)]


@explain_lack("Blocks are left out one by one: a smaller size needs less memory.")
def profile_blocks(family: Family, options: GenerationOptions, profile_options: ProfileOptions) -> None:
    """Print what each block of a LoRA does to the prediction for the prompts of the generation options.

    Raises:
        UserError: If the LoRA or a prompt cannot be used.
    """
    patterns = options.lora_patterns
    refused = {
        "--include_patterns": bool(patterns.include_patterns),
        "--exclude_patterns": bool(patterns.exclude_patterns),
        "--compile": options.speed.compilation.choice is not None,
        "a step cache": options.step_cache.is_on,
        "--preview_latent_every": options.preview.preview_latent_every is not None,
    }
    check_options(options, "a profile of blocks", refused)
    device = select_device(options.device)
    options = prepare_options(family, options, device)
    loras = expert_loras(family, options, with_texts=True)
    if not any(select_network_part(uses, selects_text_encoders=False) for uses in loras):
        raise OptionError(
            f"--lora {profile_options.lora} changes only text encoders: there are no blocks to leave out"
        )
    family = add_lora_words(family, loras)
    run = make_run(family, options, device)
    text_loras = TextLoras(loras[0], options.lora_rounding)
    if not text_loras.is_empty:  # prompts are encoded as when generating, for all measurements
        run.session.text_loras = text_loras
    recorder = BlockRecorder(family, dit_loader(family, (), device, run.options), loras)
    run.session.dits.load = recorder.load
    run.session.dits.load_to_host = None
    output = replace(run.options.output, output_type=NOTHING)
    run = replace(run, options=replace(run.options, output=output), watchers=[recorder.measure])
    lines = read_prompt_lines(options.from_file)
    failures = Failures(strict=options.from_file is None)
    jobs = list(map_lines(run, lines, failures, make_job).values())
    failures.raise_if_any(len(lines))
    for job in jobs:
        if job.prepared.request.step_cache is not None or job.lora_blocks is not None:
            raise OptionError(f"{job.label}: a step cache and --lb have no meaning for a profile: omit them")
    check_models(run)
    check_loras(family, loras)
    for use in chain(*loras):
        reject_magnitudes(use.lora, "--lora")
    count_text = format_count(len(jobs), "prompt")
    logger.info("Measuring %s at up to %d steps of %s", profile_options.lora, NUM_LEVELS, count_text)
    make_outputs(run, jobs, Failures(strict=True))
    profile = recorder.make_profile(measure_block_norms(chain(*loras)))
    prompts = [job.prepared.request.prompt for job in jobs]
    _write_profile(profile, profile_options, prompts)


def _write_profile(profile: BlockProfile, options: ProfileOptions, prompts: Sequence[str]) -> None:
    """Write the JSON and the chart if they are asked for; print the table unless JSON was printed."""
    if options.chart is not None:
        write_text(options.chart, draw_chart(profile, f"{options.lora.name} x {options.lora_multiplier:g}"))
        logger.info("wrote %s", options.chart)
    if options.json is not None:
        content = {"lora": str(options.lora), "multiplier": options.lora_multiplier, "prompts": prompts}
        text = json.dumps({**content, **to_json(profile)}, indent=2, ensure_ascii=False) + "\n"
        if str(options.json) == STDOUT:
            sys.stdout.write(text)
            return
        write_text(options.json, text)
    sys.stdout.write(escape_control_codes("\n".join(describe(profile, options.lora.name))) + "\n")


def to_json(profile: BlockProfile) -> dict[str, Any]:
    """Return the figures of a profile: columns by noise level and frame, and a row for each block."""
    rows = [
        {
            "block": block,
            "norm": profile.norms.get(block),
            "shares": list(shares),
            "shares_of_frames": list(profile.shares_of_frames.get(block, ())),
        }
        for block, shares in profile.shares.items()
    ]
    columns = {
        "sigmas": list(profile.sigmas),
        "changes": list(profile.changes),
        "frames": list(profile.frames),
    }
    return {**columns, "blocks": rows}


def describe(profile: BlockProfile, name: str) -> list[str]:
    """Return the lines of the table for a terminal."""
    width = max(map(len, (*profile.shares, "the LoRA")))
    lines = [
        f"What is lost of the effect of {name} on the prediction if a block is left out, by noise level:",
        _format_row("", width, "norm", [f"{sigma:.3f}" for sigma in profile.sigmas]),
    ]
    for block, shares in profile.shares.items():
        norm = profile.norms.get(block)
        lines.append(_format_row(block, width, "" if norm is None else f"{norm:.4g}", _to_percent(shares)))
    lines.append(_format_row("the LoRA", width, "", _to_percent(profile.changes)))
    lines.append("The last line is the change of the prediction by the whole LoRA, of the prediction's norm.")
    if len(profile.frames) > MAX_SHOWN_FRAMES:
        lines.append(
            f"--json and --chart show the shares in each of {len(profile.frames)} latent frames too."
        )
    elif profile.frames:
        lines += ["", "The same by latent frame, over all noise levels:"]
        lines.append(_format_row("", width, "", list(map(str, profile.frames))))
        for block, shares in profile.shares_of_frames.items():
            lines.append(_format_row(block, width, "", _to_percent(shares)))
    return lines


def _format_row(heading: str, width: int, norm: str, cells: Sequence[str]) -> str:
    return f"  {heading:<{width}}  {norm:>8}  {' '.join(f'{cell:>7}' for cell in cells)}".rstrip()


def _to_percent(shares: Sequence[float]) -> list[str]:
    return [f"{share:.1%}" for share in shares]


CELL_WIDTH, CELL_HEIGHT, HEADING_WIDTH = 58, 20, 190  # of the chart, in pixels


def draw_chart(profile: BlockProfile, title: str) -> str:
    """Return an SVG image: a row for each block, a column for each noise level and, for clips, each frame."""
    headings = [f"{sigma:.3f}" for sigma in profile.sigmas]
    if profile.frames:
        headings += ["", *(f"frame {frame}" for frame in profile.frames)]
    largest = max((max(shares, default=0.0) for shares in profile.shares.values()), default=0.0) or 1.0
    texts = [_draw_text(4, 14, title)]
    texts += [_draw_text(HEADING_WIDTH + CELL_WIDTH * n, 34, heading) for n, heading in enumerate(headings)]
    for row, (block, shares) in enumerate(profile.shares.items()):
        top = 40 + CELL_HEIGHT * row
        norm = profile.norms.get(block)
        texts.append(_draw_text(4, top + 14, block if norm is None else f"{block}  ({norm:.3g})"))
        cells: list[float | None] = [*shares]
        if profile.frames:
            cells += [None, *profile.shares_of_frames[block]]
        for column, share in enumerate(cells):
            if share is None:
                continue
            left = HEADING_WIDTH + CELL_WIDTH * column
            opacity = min(share / largest, 1.0)
            texts.append(
                f'<rect x="{left}" y="{top}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
                f'fill="#c2410c" fill-opacity="{opacity:.3f}"/>'
            )
            texts.append(_draw_text(left + 4, top + 14, f"{share:.1%}"))
    width = HEADING_WIDTH + CELL_WIDTH * len(headings) + 8
    height = 48 + CELL_HEIGHT * len(profile.shares)
    style = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(texts) + "\n</svg>\n"
    )


def _draw_text(left: int, baseline: int, text: str) -> str:
    return f'<text x="{left}" y="{baseline}">{html.escape(text)}</text>'


def _sum_squares(section: Section, values: Tensor) -> dict[int, float]:
    """Return the squared norm of what is denoised, by latent frame of the clip; AUDIO is the audio's."""
    squares: dict[int, float] = {}
    audio_video = section.overrides.audio_video_shapes
    if audio_video is not None:
        values, audio = audio_video.split(values)
        if section.clean_audio is None:
            squares[AUDIO] = float(audio.double().square().sum())
    num_clean = 0 if section.clean_frames is None else section.clean_frames.shape[2]
    by_frame = values.double().square().sum(dim=(0, 1, 3, 4)).tolist()
    for frame, square in enumerate(by_frame):
        if frame >= num_clean:
            squares[section.first_latent_frame + frame] = square
    return squares


def _add_squares(totals: dict[int, float], section: Section, values: Tensor) -> None:
    for frame, square in _sum_squares(section, values).items():
        totals[frame] += square


def _divide(squares: Sequence[float], wholes: Sequence[float]) -> list[float]:
    """Return the ratios of norms whose squares are given; 0 where the whole is 0."""
    return [(square / whole) ** 0.5 if whole else 0.0 for square, whole in zip(squares, wholes, strict=True)]
