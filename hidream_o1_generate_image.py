"""Make and edit images with HiDream-O1-Image."""

import modules.interpreter  # noqa: F401
from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import (
    CANCELS,
    IMAGE_GENERATION_OPTIONS,
    REFERENCES,
    SOLVERS,
    LineOption,
    read_path,
)
from generation.script_options import IMAGE_FPS, PICTURE_OUTPUTS, ScriptDefaults
from generation.scripts import generation_script
from hidream_o1.options import (
    DEV_STEPS,
    EXTRAS,
    GUIDANCE,
    RELEASED_SOLVER,
    SHIFT,
    SIDE,
    STEPS,
    resolve_generation,
)

DEFAULTS = ScriptDefaults(
    fps=IMAGE_FPS,
    guidance_scale=GUIDANCE,
    infer_steps=STEPS,
    flow_shift=SHIFT,
    sample_solver=RELEASED_SOLVER,
    solvers={RELEASED_SOLVER: RELEASED_SOLVER, **SOLVERS},
    solver_help="solver; released: unipc, and for Dev fresh noise at its fixed noise levels",
    defaults_from_model={
        "flow_shift": f"time shift of the noise levels; default: {SHIFT:g}, with several references 1",
        "guidance_scale": "weight of the prompt: negative + weight * (positive - negative); 1 turns guidance "
        f"off; default: {GUIDANCE:g}, for Dev 1",
        "infer_steps": f"number of denoising steps; default: {STEPS}, for Dev {DEV_STEPS}",
    },
    size=(SIDE, SIDE),
    pictures=True,
    media=frozenset({"control_image_path"}),
    source=SourceDefaults(denoise_option="strength", denoise=0.75, takes_video=False),
    line_options={
        **IMAGE_GENERATION_OPTIONS,
        **REFERENCES,
        **{name: LineOption(name, read_path, CANCELS) for name in EXTRAS},
    },
    output_types=PICTURE_OUTPUTS,
    refused={"prompt_weighting": "tokens have no weights in this model. Omit it"},
)
main = generation_script("hidream_o1", DEFAULTS, __doc__, adjust_options=resolve_generation)


if __name__ == "__main__":
    main.run()
