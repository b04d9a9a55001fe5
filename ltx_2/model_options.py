"""Options of LTX-2's files, how they run, and of guidance, which scripts share. Standard library only."""

from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import DECODING_SETTING, FREE, IDENTITY, Options, option
from modules.speed_options import VaeOptions, fp8_text_option, text_form_option
from modules.text_files import read_safetensors_texts

VIDEO, AUDIO = STREAMS = ("video", "audio")
MODES = {  # values of --ltx2_mode: streams that are trained or generated
    **dict.fromkeys(("v", "video"), (VIDEO,)),
    **dict.fromkeys(("av", "va"), STREAMS),
    **dict.fromkeys(("a", "audio"), (AUDIO,)),
}
CHECKPOINT = Path("models/ltx-2.3-22b-dev.safetensors")
GEMMA_4_KEY = "gemma_source_checkpoint"  # metadata of transformers that were trained with Gemma 4: LTX-2.5
GEMMA = Path("models/gemma-3-12b-it-qat-q4_0-unquantized")


def is_version_2_5(checkpoint: Path) -> bool:
    """Return whether a released file's metadata show LTX-2.5; False if they cannot be read."""
    try:
        return GEMMA_4_KEY in read_safetensors_texts(checkpoint)
    except (OSError, ValueError):
        return False


class Ltx2ModelOptions(Options):
    """Path of the released file, and of parts to use in place of its own."""

    ltx2_checkpoint: Path = option(
        "the released file, with transformer, autoencoders, vocoder and connectors (LTX-2.5: transformer and "
        "connectors); or the folder of a release in diffusers' layout",
        flags=("--transformer-path",),
        default=CHECKPOINT,
        facts={**FREE, **DECODING_SETTING},
        often=True,
    )
    ltx_mode: str = option(
        "what is trained or generated: v or video, av (video with audio), a or audio (audio only)",
        flags=("--ltx2_mode",),
        default="v",
        choices=tuple(MODES),
        facts={**IDENTITY, "same_as": {"video": "v", "va": "av", "audio": "a"}},
        often=True,
    )

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of the mode: video, audio or both."""
        return MODES[self.ltx_mode]


class Ltx2TextOptions(Options):
    """Path of Gemma, and how it runs."""

    gemma_root: Path = option(
        "folder of the Gemma 3 (12B) text encoder; not for LTX-2.5", default=GEMMA, often=True
    )
    gemma_safetensors: Path | None = option(
        "Gemma 3 as one file; its tokenizer is then in --gemma_root, or in or next to the file"
    )
    ltx2_text_encoder_checkpoint: Path | None = option(
        "file with text projections and connectors, if they are not in --ltx2_checkpoint; or LTX-2.5's text "
        "encoder, Gemma 4 with projections and tokenizer",
        flags=("--text-encoder-path",),
    )
    text_encoder_dtype: str | None = option(
        "dtype that Gemma and the connectors compute in; default: bfloat16, but float32 with a float32 "
        "transformer"
    )
    in_fp8: bool = fp8_text_option(
        "gemma_load_in_8bit",
        "Gemma's linear layers in 8 bits (fp8): half the memory, slightly different texts",
    )
    text_encoder_form: str | None = text_form_option()
    text_encoder_cpu: bool = option("run the text encoder on the CPU")

    @property
    def gemma(self) -> Path:
        """Return Gemma's path: the single file if given, else the folder."""
        return self.gemma_safetensors or self.gemma_root

    @property
    def tokenizer(self) -> Path | None:
        """Return the tokenizer's folder for a single-file Gemma; None if it is next to Gemma."""
        is_there = self.gemma_root != GEMMA or self.gemma_root.is_dir()
        return self.gemma_root if self.gemma_safetensors is not None and is_there else None

    def command_options(self, checkpoint: Path) -> dict[str, Any]:
        """Return the options that select the same text encoder in another script.

        `checkpoint` is the released file. A placeholder stands for a missing file.
        """
        encoder_file: Path | str | None = self.ltx2_text_encoder_checkpoint
        folder: Path | str | None = self.gemma_root
        if is_version_2_5(checkpoint):
            encoder_file = encoder_file or Placeholder("GEMMA_4_FILE")
            folder = None
        elif self.gemma_safetensors is not None:
            folder = self.tokenizer
        elif folder == GEMMA and not GEMMA.is_dir():  # the default folder, which does not exist here
            folder = Placeholder("GEMMA_FOLDER") if encoder_file is None else None
        return {
            "--gemma_root": folder,
            "--gemma_safetensors": self.gemma_safetensors,
            "--ltx2_text_encoder_checkpoint": encoder_file,
            "--gemma_load_in_8bit": self.in_fp8,
            "--text_encoder_form": self.text_encoder_form,
        }


class Ltx2VaeOptions(Options):
    """VAE files that replace the VAEs in --ltx2_checkpoint, and settings for running VAEs."""

    file: VaeOptions = option(
        facts=DECODING_SETTING,
        settings={
            "vae": {
                "help": "video VAE; default: that in --ltx2_checkpoint",
                "flags": ("--ltx2_video_vae", "--video-vae-path"),
            }
        },
    )
    audio_vae: Path | None = option(
        "file of the audio VAE and vocoder; default: those in --ltx2_checkpoint",
        flags=("--ltx2_audio_vae", "--audio-vae-path"),
        facts=DECODING_SETTING,
    )


class Ltx2GuidanceOptions(Options, title="guidance of both streams"):
    """Guidance weights of video and audio; None selects the released weight."""

    video_cfg_scale: float | None = option("weight of the prompt for the video; {default}", minimum=0)
    audio_cfg_scale: float | None = option("weight of the prompt for the audio; {default}", minimum=0)
    video_modality_scale: float | None = option(
        "guide the video away from predictions without audio; 1: not at all; {default}", minimum=0
    )
    audio_modality_scale: float | None = option(
        "guide the audio away from predictions without video; 1: not at all; {default}", minimum=0
    )
    rescale_scale: float | None = option(
        "how far guided predictions are rescaled to the standard deviation of unguided ones, for both "
        "streams; {default}",
        minimum=0,
        maximum=1,
    )
    video_rescale_scale: float | None = option("the same for the video only", minimum=0, maximum=1)
    audio_rescale_scale: float | None = option("the same for the audio only", minimum=0, maximum=1)
    stg_scale: float | None = option(
        "guide away from predictions whose self-attention is skipped in --stg_blocks; 0: not at all; "
        "{default}",
        minimum=0,
    )
    stg_blocks: tuple[int, ...] | None = option(
        "blocks whose self-attention is skipped; {default}", minimum=0
    )
    stg_mode: str | None = option(
        "streams in which it is skipped; default: both", choices=("video", "audio", "both")
    )

    def rescaling(self, stream: str) -> float | None:
        """Return a stream's guidance rescaling: its own option, else the shared one; None for the default."""
        stream_scale = self.video_rescale_scale if stream == VIDEO else self.audio_rescale_scale
        return self.rescale_scale if stream_scale is None else stream_scale
