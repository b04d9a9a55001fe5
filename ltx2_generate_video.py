"""Generate videos with LTX-2 and LTX-2.3, with or without sound.

All options: python ltx2_generate_video.py --help
"""

import modules.interpreter  # noqa: F401
from generation.script_options import ScriptDefaults
from generation.scripts import generation_script
from ltx_2.options import settle_generation

DEFAULTS = ScriptDefaults(
    fps=24,
    sample_solver="vanilla",
    media=frozenset({"image_path"}),
    size=(512, 768),
    has_sound=True,
    spellings={"save_path": "--output_dir"},
)
main = generation_script("ltx_2", DEFAULTS, __doc__, settle=settle_generation)


if __name__ == "__main__":
    main.run()
