"""Generate images with HunyuanImage-2.1 by the command line of the image guides.

It has all options of hunyuan_image_generate_image.py. All of them:
python hunyuan_image_minimal_inference.py --help
"""

import modules.interpreter  # noqa: F401
from generation.scripts import generation_script
from hunyuan_image_generate_image import DEFAULTS

main = generation_script(
    "hunyuan_image", DEFAULTS, __doc__, change_parser=lambda parser: parser.set_defaults(negative_prompt="")
)


if __name__ == "__main__":
    main.run()
