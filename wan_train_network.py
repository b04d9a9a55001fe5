"""Train a LoRA for Wan2.1. All options: python wan_train_network.py --help"""

from collections.abc import Sequence

from families import identify
from modules.command import as_typed, command_line
from training.options import TrainingOptions, read_training
from wan.options import WanTrainingOptions, add_training_arguments


def main(argv: Sequence[str] | None = None) -> None:
    options, wan_options = read_training(__doc__, add_training_arguments, WanTrainingOptions, argv)

    from dataset.batches.finding import CachingCommands
    from training.run import train_network  # torch loads here, after every option has been read
    from wan.family import family_for_training

    commands = CachingCommands(*caching_commands(options, wan_options))
    code = train_network(family_for_training(wan_options), options, commands)
    if code:
        raise SystemExit(code)


def caching_commands(options: TrainingOptions, wan_options: WanTrainingOptions) -> tuple[str, str]:
    """Return the commands that make missing caches, of latents and of texts."""
    dataset = ["--dataset_config", str(options.loop.dataset_config)]
    latents = ["python", "wan_cache_latents.py", *dataset, "--vae", str(wan_options.vae.vae or "VAE_FILE")]
    if wan_options.task.startswith(("i2v", "flf2v")):
        latents += ["--clip", str(wan_options.clip or "CLIP_FILE")]
    if wan_options.task.startswith("flf2v"):
        latents.append("--flf2v")
    text = [
        "python",
        "wan_cache_text_encoder_outputs.py",
        *dataset,
        "--t5",
        str(wan_options.text.t5 or "T5_FILE"),
    ]
    return as_typed(latents), as_typed(text)


if __name__ == "__main__":
    command_line(main, explain=identify)
