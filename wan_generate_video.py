"""Generate videos and images with Wan2.1 and Wan2.2. All options: python wan_generate_video.py --help"""

import modules.interpreter  # noqa: F401
from generation.script_options import FASTER, ScriptDefaults
from generation.scripts import generation_script

DEFAULTS = ScriptDefaults(
    fps=16,
    by_model={"fps": "frames per second of the video file; default: the task's, 24 for ti2v-5B, else 16"},
    output_types=("video", "images", "latent", "both", "latent_images"),
    has_experts=True,
    optimized={**FASTER, "fp16_accumulation": True, "rope_func": "comfy"},
    riflex_frequencies=22,
)
main = generation_script("wan", DEFAULTS, __doc__)


if __name__ == "__main__":
    main.run()
