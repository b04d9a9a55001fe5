"""Generate images with Anima by the command line of the image guides.

It has all options of anima_generate_image.py, with the guides' defaults: shift 5, guidance 3.5, 50 steps.
All of them: python anima_minimal_inference.py --help
"""

from dataclasses import replace

import modules.interpreter  # noqa: F401
from anima_generate_image import DEFAULTS
from generation.scripts import generation_script

main = generation_script(
    "anima",
    replace(DEFAULTS, guidance_scale=3.5, infer_steps=50, flow_shift=5.0),
    __doc__,
    change_parser=lambda parser: parser.set_defaults(negative_prompt=""),
)


if __name__ == "__main__":
    main.run()
