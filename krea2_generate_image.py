"""Generate or edit images with Krea 2, raw and Turbo."""

import argparse

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import IMAGE_GENERATION_OPTIONS, REFERENCES, LineOption, read_number
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from krea2.options import REPLACED, SIDE, resolve_generation


def _read_image_count(text: str) -> int:
    """Read --i of a prompt line, which sets the number of images in other tools."""
    if text != "1":
        raise ValueError(
            f"a line generates one image, not {text}: repeat it, each time with another seed (--d)"
        )
    return 1


def _shift_options() -> dict[str, LineOption]:
    """Return the options of a prompt line that set the time shift; each one replaces the others."""
    options = {}
    for name, replaced in REPLACED.items():
        key = "flow_shift" if name == "fs" else name
        options[name] = LineOption(key, read_number, replaced_keys=replaced)
    return options


def _take_prompt(parser: argparse.ArgumentParser) -> None:
    """Accept the prompt without its flag too, and default to an empty negative prompt, as other tools do."""
    parser.set_defaults(negative_prompt="")
    for action in parser._actions:
        if action.dest == "prompt":
            action.by_place = True  # type: ignore[attr-defined]


DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=5.5,
    infer_steps=28,
    defaults_from_model={
        **dict.fromkeys(("video_size", "width", "height", "y1", "y2"), ""),
        "flow_shift": "time shift of the schedule, e^mu, in place of --mu; default: by size, of Turbo e^1.15",
        "guidance_scale": "weight of the prompt: negative + weight * (positive - negative); 1 turns guidance "
        "off. Other programs count it from 0, one less; default: 1 for Turbo, else 5.5",
        "infer_steps": "number of denoising steps; default: 8 for Turbo, else 28",
    },
    sample_solver="vanilla",
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    splits_attention=True,
    size=(SIDE, SIDE),
    pictures=True,
    spellings={"infer_steps": ("--steps",), "num_videos": ("--num-images",)},
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        **_shift_options(),
        "i": LineOption("pictures_of_line", _read_image_count),
    },
    output_types=PICTURE_OUTPUTS,
)
main = generation_script(
    "krea2", DEFAULTS, __doc__, adjust_options=resolve_generation, change_parser=_take_prompt
)


if __name__ == "__main__":
    main.run()
