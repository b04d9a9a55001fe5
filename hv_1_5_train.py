"""Fine-tune the whole transformer of HunyuanVideo 1.5."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("hunyuan_video_1_5", __doc__, full_dit=True)


if __name__ == "__main__":
    main.run()
