"""Prepare clips and captions in CogVideoX form: the folders that load_tensors of a dataset reads.

All options: python prepare_dataset.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from dataset.cogvideox.options import MAX_TOKENS, PrepareOptions, add_prepare_arguments
from families import identify
from modules.command import Parser, command_line
from modules.errors import CheckpointError
from modules.installation import import_own
from modules.options import read_options

# class of a pipeline's VAE -> who opens it, with its text encoders
MAKERS = {
    "AutoencoderKLWan": "wan.preparing",
    "AutoencoderKLHunyuanVideo": "hunyuan_model.preparing",
    "AutoencoderKLCogVideoX": "dataset.cogvideox.pipeline",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_prepare_arguments(parser)
    options = read_options(PrepareOptions, parser.parse_args(argv))

    from dataset.cogvideox.clips import DTYPES  # torch loads here, after every option has been read
    from dataset.cogvideox.model_folder import find_model, read_vae_class
    from dataset.cogvideox.preparing import conclude, prepare
    from modules.contract.moments_maker import MakerSettings

    maker, encoding = None, options.encoding
    if encoding.save_latents_and_embeddings and encoding.model_id is not None:
        folder = find_model(encoding.model_id)
        name = read_vae_class(folder)
        if name not in MAKERS:
            raise CheckpointError(
                f"--model_id {encoding.model_id}: its VAE is {name}; known are {', '.join(MAKERS)}", folder
            )
        tokens = None if encoding.max_sequence_length == MAX_TOKENS else encoding.max_sequence_length
        settings = MakerSettings(DTYPES[encoding.dtype], encoding.use_tiling, tokens)
        maker = import_own(MAKERS[name]).make_maker(folder, settings)
    conclude(prepare(options, maker), options.output_dir)


if __name__ == "__main__":
    command_line(main, explain=identify)
