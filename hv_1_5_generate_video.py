"""Generate videos and images with HunyuanVideo 1.5."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import GENERATION_OPTIONS
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    splits_attention=True,
    fps=24,
    guidance_scale=6.0,
    infer_steps=50,
    sample_solver="vanilla",
    media=frozenset({"image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.8, pad_mode=None),
    size=(480, 848),
    defaults_from_model={
        "video_size": "size in pixels; default: that of the release (848x480 or 1280x720), or about its area "
        "in the shape of the image that the clip begins with"
    },
    output_types=("video", "images", "latent", "both", "latent_images"),
    line_options=GENERATION_OPTIONS,
    riflex_frequencies=8,
)
main = generation_script("hunyuan_video_1_5", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
