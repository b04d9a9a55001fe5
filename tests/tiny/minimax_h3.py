"""A complete tiny MiniMax-H3 on disk: released file layouts, or diffusers' folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from minimax_h3.files import LAYERS, OWN_TOKENS
from minimax_h3.released import AUDIO_MEAN, AUDIO_STD
from tests.minimax_h3 import test_audio, test_video_vae
from tests.minimax_h3.tiny_dit import released, their_dit
from tests.tiny.language_models import DIM, QWEN_TOKENS, _tokenizer, qwen3_vl, write_model

TEXT_LAYERS = LAYERS + 1  # one that is not read


@dataclass(frozen=True)
class TinyH3:
    """Paths of a tiny checkpoint set."""

    dit: Path
    video_vae: Path
    audio_vae: Path
    text_encoder: Path
    tokenizer: Path

    @property
    def words(self) -> list[str]:
        """The options that name the files, in float32."""
        options = {
            "--dit": self.dit,
            "--video_vae": self.video_vae,
            "--audio_vae": self.audio_vae,
            "--text_encoder": self.text_encoder,
            "--tokenizer": self.tokenizer,
        }
        return [word for name, path in options.items() for word in (name, str(path))]


def their_h3_dit() -> Any:
    return their_dit(text_dim=DIM)


def their_audio_vae() -> Any:
    """As many samples for a latent as the release has, 800, in two stages."""
    return test_audio.their_vae(
        encoder_rates=(20, 40),
        decoder_rates=(40, 20),
        decoder_kernel_sizes=(80, 40),
        latents_mean=AUDIO_MEAN,
        latents_std=AUDIO_STD,
    )


def write_tokenizer(folder: Path) -> Path:
    """Write tokenizer.json with MiniMax-H3's own tokens. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer((*QWEN_TOKENS, *OWN_TOKENS), behind=True).save(str(folder / "tokenizer.json"))
    return folder


def write_tiny_h3(folder: Path, layers: int = TEXT_LAYERS) -> TinyH3:
    """Write single files, as they are in circulation, and the tokenizer in a folder of its own.

    layers: of the text encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = TinyH3(
        folder / "minimax_h3_fl2va_bf16.safetensors",
        video_vae=folder / "minimax_h3_video_vae.safetensors",
        audio_vae=folder / "minimax_h3_audio_vae.safetensors",
        text_encoder=folder / "text" / "qwen3vl.safetensors",
        tokenizer=write_tokenizer(folder / "tokenizer"),
    )
    save_file(released(their_h3_dit().state_dict()), files.dit)
    save_file(test_video_vae.released(test_video_vae.their_vae().state_dict()), files.video_vae)
    save_file(their_audio_vae().state_dict(), files.audio_vae)
    files.text_encoder.parent.mkdir()
    write_model(files.text_encoder, text_encoder(layers))
    return files


class TheirVideoProcessor:
    """transformers' video processor for frames that keep their size; the real one needs torchvision."""

    temporal_patch_size = 2

    def __call__(
        self, videos: list[numpy.ndarray], do_sample_frames: bool, return_tensors: str
    ) -> dict[str, torch.Tensor]:
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        patches, grids = [], []
        for video in videos:
            pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float()[None] / 127.5 - 1
            flat, *sides = Qwen3VLVideoProcessor.patchify(None, pixels, 16, 2, 2)
            patches.append(flat.flatten(0, -2))
            grids.append([len(patches[-1]) // (sides[-2] * sides[-1]), *sides[-2:]])
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}


class TheirProcessor:
    """What diffusers asks of Qwen3-VL's processor."""

    def __init__(self, tokenizer: Any, fewest: int = 65536) -> None:
        """fewest: pixels of a picture; smaller ones are enlarged, as by the released file."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        half = [0.5] * 3
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=16,
            image_mean=half,
            image_std=half,
            size={"shortest_edge": fewest, "longest_edge": 16777216},
        )
        self.video_processor = TheirVideoProcessor()
        names = ("<|image_pad|>", "<|video_pad|>")
        self._kinds = {tokenizer.convert_tokens_to_ids(name): kind for kind, name in enumerate(names, 1)}

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[self._kinds.get(number, 0) for number in row] for row in rows]


def their_tokenizer(files: TinyH3) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(files.tokenizer / "tokenizer.json"), pad_token="<|endoftext|>"
    )


def their_pipeline(files: TinyH3, decodes: bool = True, **configs: int) -> Any:
    """diffusers' modular pipeline with both transformers alike, float32.

    decodes: what it makes, latents alone otherwise. configs: of its blocks.
    """
    from diffusers import MiniMaxH3Scheduler
    from diffusers.modular_pipelines import MiniMaxH3Blocks

    tokenizer = their_tokenizer(files)
    blocks = MiniMaxH3Blocks()
    if not decodes:
        blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=their_h3_dit(),
        transformer_ref=their_h3_dit(),
        vae=test_video_vae.their_vae(),
        audio_vae=their_audio_vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        processor=TheirProcessor(tokenizer),
        scheduler=MiniMaxH3Scheduler(12.0),
        audio_scheduler=MiniMaxH3Scheduler(3.0),
        **configs,
    )
    return pipe


def text_encoder(layers: int = TEXT_LAYERS) -> Any:
    with torch.random.fork_rng():
        return qwen3_vl(layers)
