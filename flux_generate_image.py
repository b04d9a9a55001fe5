"""Generate images with FLUX.1 and Chroma."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from flux.options import DEFAULT_GUIDANCE
from generation.prompt_lines import EMBEDDED_IMAGE_OPTIONS
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=IMAGE_FPS,
    size=(1024, 1024),
    pictures=True,
    sample_solver="vanilla",
    embedded_guidance=DEFAULT_GUIDANCE,
    media=frozenset(),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    joins_guidance=True,
    blocks_to_swap=None,
    has_second_prompt=True,
    line_options=EMBEDDED_IMAGE_OPTIONS,
    output_types=PICTURE_OUTPUTS,
)
main = generation_script("flux", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
