"""Files of a FramePack run: transformer, text encoders, and the check that each fits its option.

The text encoders are HunyuanVideo's; names, shapes and dtypes of their outputs follow FramePack's caches.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import hunyuan_model.checkpoints as hunyuan
from checkpoints.dialects import DitShapes, make_wrong_kind_error
from checkpoints.dits import DitFormat, DitHeader, own_names
from checkpoints.encoders import check_state_width
from checkpoints.model_files import inside, read_once, require_file
from checkpoints.opening import Checkpoint, open_checkpoint
from encoders.clip_l import PooledClip
from encoders.siglip import ENCODER_OPTION, FILES, read_siglip_width
from frame_pack.configs import DIT, FramePackConfig
from frame_pack.model import FramePackModel
from hunyuan_model.files import HunyuanFiles
from hunyuan_model.text_encoders import CLIP, LLAVA_SETTINGS, LlavaTextEncoder
from hunyuan_model.token_refiner import FRAMEPACK_REFINER
from modules.errors import CheckpointError, OptionError
from protocols.data import Conditions
from protocols.requests import Prompt

FRAMEPACK_CLIP = replace(CLIP, pooled_key="clip_l_pooler", mask_key=None)
TEXT_ROWS = 512  # number of rows of the language model's states; those after the prompt are zero


class FramePackLlama(LlavaTextEncoder):
    """LLaMA of HunyuanVideo as FramePack's first text encoder, limited to 256 tokens of a prompt."""

    default_settings = replace(
        LLAVA_SETTINGS, name="llama", states_key="llama_vec", mask_key="llama_attention_mask"
    )

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return {"llama_vec": 512 C, "llama_attention_mask": 512 bool, true for real tokens}.

        Each prompt is encoded alone and padded to 512 tokens, as in the released code. Less padding or
        several prompts at once would be faster, but would change the order of sums and so the last bits.
        """
        padded: list[Conditions] = []
        for prompt in prompts:
            (encoded,) = super().encode([prompt])
            states, mask = encoded["llama_vec"], encoded["llama_attention_mask"]
            # prompts without weights have plain tensors
            assert isinstance(states, Tensor)
            assert isinstance(mask, Tensor)
            count = int(mask.sum())
            rows = states.new_zeros(TEXT_ROWS, states.shape[1])
            rows[:count] = states[:count]
            padded.append({"llama_vec": rows, "llama_attention_mask": torch.arange(TEXT_ROWS) < count})
        return padded


class FramePackClip(PooledClip):
    """Text encoder 2: CLIP-L's pooled state, one vector per prompt, with prompts encoded one at a time."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float16, tokenizer: Path | None = None) -> None:
        super().__init__(path, dtype, tokenizer, FRAMEPACK_CLIP)
        self.name = "clip_l"

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        """Return CLIP-L's pooled state, {"clip_l_pooler": C}, for each prompt."""
        read = super().encode
        return [encoded for prompt in prompts for encoded in read([prompt])]


# FramePack and FramePack-F1 have the same tensors, so their files cannot be told apart
MODEL_KIND = "a FramePack transformer"
FEED_FORWARD = "transformer_blocks.0.ff.net.0.proj.weight"
CONFIG_TENSORS = {  # for `hunyuan.read_dimensions`
    "in_dim": "x_embedder.proj.weight",
    "num_heads": "transformer_blocks.0.attn.norm_q.weight",
    "ffn_dim": FEED_FORWARD,
    "refiner_blocks": "context_embedder.token_refiner.refiner_blocks",
    "refiner_ffn_dim": "context_embedder.token_refiner.refiner_blocks.0.ff.net.0.proj.weight",
    "text_dim": "context_embedder.proj_in.weight",
    "pooled_dim": "time_text_embed.text_embedder.linear_1.weight",
    "freq_dim": "time_text_embed.timestep_embedder.linear_1.weight",
    "out_dim": "proj_out.weight",
}
FRAMEPACK_TENSORS = (
    "clean_x_embedder.proj.weight",
    "image_projection.up.weight",
)


def _read_header(checkpoint: Checkpoint) -> DitHeader[FramePackConfig]:
    """Return dimensions, tensor naming and dtype of a FramePack file."""
    path, names = checkpoint.path, checkpoint.tensors
    if not any(name in names for name in FRAMEPACK_TENSORS):
        files = (
            "the transformer's checkpoint, such as the folder of FramePackI2V_HY or "
            "FramePackI2V_HY_bf16.safetensors,"
        )
        related = hunyuan.describe(checkpoint)  # names the model that the file probably is
        if related is None:
            raise make_wrong_kind_error(checkpoint, MODEL_KIND, "--dit", files)
        raise CheckpointError(
            f"{path} is not {MODEL_KIND}; it looks like {related}.\n  Pass {files} to --dit.", path
        )
    shapes = DitShapes(path, {name: info.shape for name, info in names.items()}, "FramePack")
    shared = hunyuan.read_dimensions(shapes, DIT, CONFIG_TENSORS)
    image_hidden_dim, image_dim = shapes.get_shape("image_projection.up.weight")
    config = FramePackConfig(**shared, image_dim=image_dim, image_hidden_dim=image_hidden_dim)
    return DitHeader(config, "official", names[FEED_FORWARD].dtype)


FORMAT = DitFormat(_read_header, lambda _: MODEL_KIND, FramePackModel, own_names)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class FramePackFiles(HunyuanFiles):
    """Model files of a run: the transformer, HunyuanVideo's encoders, and SigLIP."""

    image_encoder: Path | None = None

    format: ClassVar = FORMAT
    refiner: ClassVar = FRAMEPACK_REFINER
    encoders: ClassVar = (FramePackLlama, FramePackClip)

    @property
    def image_encoder_path(self) -> Path:
        """Return SigLIP's path; raise OptionError if --image_encoder is missing."""
        return inside(
            require_file(self.image_encoder, ENCODER_OPTION, "FramePack encodes its start image with SigLIP"),
            "image_encoder",
        )

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed, including SigLIP's width. Loads nothing."""
        super().check(needed)
        if self.image_encoder is not None or "image_encoder" in needed:
            path, takes = self.image_encoder_path, None
            if self.dit is not None:
                takes = self.dit_header().config.image_dim
            check_state_width(
                ENCODER_OPTION, path, read_once(path, read_siglip_width), self.dit, takes, FILES
            )


def read_window_size(paths: Sequence[Path], default: int) -> int:
    """Return the number of latent frames per section recorded in latents files; `default` if there is none.

    Raises:
        OptionError: If the files differ.
        CheckpointError: If a file is damaged.
    """
    windows = {}
    for path in paths:
        text = ""
        if path.suffix == ".safetensors":
            with open_checkpoint(path) as file:
                # the second name is written by other programs
                text = file.metadata.get("bt_latent_window_size", file.metadata.get("latent_window_size", ""))
        windows[path] = int(text) if re.fullmatch(r"[1-9][0-9]{0,3}", text) else default
    if len(set(windows.values())) > 1:
        listed = ", ".join(f"{path}: {window}" for path, window in windows.items())
        raise OptionError(
            f"--latent_path: sections of different lengths ({listed} latent frames). Decode them in "
            "separate runs."
        )
    return next(iter(windows.values()), default)
