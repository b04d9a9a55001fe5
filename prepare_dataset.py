"""Prepare clips and captions in CogVideoX form: the folders that load_tensors of a dataset reads.

All options: python prepare_dataset.py --help
"""

from collections.abc import Sequence
from logging import getLogger

import modules.interpreter  # noqa: F401
from dataset.cogvideox.options import MAX_TOKENS, PrepareOptions
from modules.command import command_line
from modules.errors import CheckpointError
from modules.families import identify
from modules.parser import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, PrepareOptions)

    from dataset.cogvideox import pipeline  # torch loads here, after every option has been read
    from dataset.cogvideox.clips import DTYPES
    from dataset.cogvideox.model_folder import find_model, read_vae_class
    from dataset.cogvideox.preparing import conclude, prepare
    from hunyuan_model import preparing as hunyuan
    from modules.contract.family import MakerSettings
    from wan import preparing as wan

    # by the class of a pipeline's VAE
    makers = {
        "AutoencoderKLWan": wan.make_maker,
        "AutoencoderKLHunyuanVideo": hunyuan.make_maker,
        "AutoencoderKLCogVideoX": pipeline.make_maker,
    }
    maker, encoding = None, options.encoding
    if encoding.save_latents_and_embeddings and encoding.model_id is not None:
        folder = find_model(encoding.model_id)
        name = read_vae_class(folder)
        if name not in makers:
            raise CheckpointError(
                f"--model_id {encoding.model_id}: its VAE is {name}; known are {', '.join(makers)}", folder
            )
        tokens = None if encoding.max_sequence_length == MAX_TOKENS else encoding.max_sequence_length
        settings = MakerSettings(DTYPES[encoding.dtype], encoding.use_tiling, tokens)
        maker = makers[name](folder, settings)
    elif encoding.model_id is not None:
        getLogger(__name__).info(
            "--model_id %s is not loaded: without --save_latents_and_embeddings nothing is encoded",
            encoding.model_id,
        )
    conclude(prepare(options, maker), options.output_dir)


if __name__ == "__main__":
    command_line(main, explain=identify)
