"""Fine-tune the whole transformer of Wan2.1."""

import modules.interpreter  # noqa: F401
from modules.errors import OptionError
from training.scripts import training_script
from wan.options import WanTrainingOptions


def reject_lora_options(options: WanTrainingOptions) -> None:
    """Raise OptionError for options that work only with a LoRA's frozen transformer."""
    if options.mixed_precision_transformer:
        raise OptionError(
            "--mixed_precision_transformer: trained weights are kept in float32, or in bfloat16 with "
            "--full_bf16; omit it"
        )
    if options.sample_dit_other is not None:
        raise OptionError(
            "--sample_dit_other: a transformer that is trained as a whole cannot leave the device for "
            "another. Omit it: samples are made with the trained one alone"
        )


main = training_script("wan", __doc__, full_dit=True, check=reject_lora_options)


if __name__ == "__main__":
    main.run()
