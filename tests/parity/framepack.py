"""FramePack as diffusers computes it: transformer, encoders and the caches of the known tuners."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.parity.hunyuan import load_vae
from tests.parity.reference import to_pixels

SCALE = 0.476986
Frames = Sequence[numpy.ndarray]  # H W 3 uint8 each
Section = dict[str, Tensor]


@dataclass(frozen=True)
class Encoders:
    """The two networks that caching needs.

    In 16 bits each computes as diffusers and transformers have it; noise is float32.
    """

    vae: Path
    siglip: Path
    vae_dtype: torch.dtype = torch.float32
    siglip_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def latents(self, frames: Frames, generator: torch.Generator) -> Tensor:
        """A sample of the posterior, 16 F h w float32: cut in space from 256 pixels on, in time where longer
        than 192 frames.
        """
        vae = load_vae(self.vae).to(self.vae_dtype)
        vae.enable_tiling(
            tile_sample_min_height=256,
            tile_sample_min_width=256,
            tile_sample_stride_height=192,
            tile_sample_stride_width=192,
        )
        vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 192, 144
        posterior = vae.encode(to_pixels(frames).to(self.vae_dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        return (posterior.mean.float() + posterior.std.float() * noise)[0] * SCALE

    @torch.no_grad()
    def features(self, frame: numpy.ndarray) -> Tensor:
        """729 D in the dtype of the image tower."""
        processor = SiglipImageProcessorPil(
            size={"height": 384, "width": 384},
            resample=Image.Resampling.BICUBIC,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        pixels = processor.preprocess([frame], return_tensors="pt")["pixel_values"]
        return (
            load_siglip(self.siglip).to(self.siglip_dtype)(pixels.to(self.siglip_dtype)).last_hidden_state[0]
        )


def load_siglip(path: Path) -> SiglipVisionModel:
    """An image tower whose heads have 72 channels, for images of 384 pixels."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(path).items()}
    dim = tensors["embeddings.position_embedding.weight"].shape[1]
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=dim,
            intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=1
            + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers.")),
            num_attention_heads=dim // 72,
            image_size=384,
            patch_size=14,
        )
    ).eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in siglip.state_dict()) else ""
    _, unexpected = siglip.load_state_dict(
        {prefix + name: tensor for name, tensor in tensors.items()}, strict=False
    )
    assert not unexpected
    return siglip


def places_of(window: int, padding: int | None) -> dict[str, list[int]]:
    """Places of a section. padding: windows between it and the start image; None: of FramePack-F1."""
    line = count()

    def take(*lengths: int) -> list[list[int]]:
        return [list(islice(line, length)) for length in lengths]

    if padding is None:
        start, far, near, last, target = take(1, 16, 2, 1, window)
    else:
        start, _, target, last, near, far = take(1, padding * window, window, 1, 2, 16)
    return {
        "latent_indices": target,
        "clean_latent_indices": start + last,
        "clean_latent_2x_indices": near,
        "clean_latent_4x_indices": far,
    }


def default_paddings(sections: int) -> list[int]:
    """In the order of making, which begins at the end of the video."""
    return [3, *[2] * (sections - 3), 1, 0] if sections > 4 else list(range(sections - 1, -1, -1))


def section_of(target: list[Tensor], seen: Sequence[list[Tensor]], places: dict[str, list[int]]) -> Section:
    """seen: the start image and the nearest frame, two farther frames, sixteen beyond them."""
    names = ("latents", "latents_clean", "latents_clean_2x", "latents_clean_4x")
    made = {name: torch.stack(frames, dim=1) for name, frames in zip(names, (target, *seen), strict=True)}
    return made | {name: torch.tensor(numbers) for name, numbers in places.items()}


def anti_drifting_sections(latents: Tensor, window: int) -> dict[int, Section]:
    """By number of the section from the clip's start. latents: 16 F h w of the clip."""
    video = list(latents.unbind(1))
    sections = (len(video) - 1) // window
    history = [torch.zeros_like(video[0])] * 19  # earliest in the video first
    made = {}
    for padding, section in zip(default_paddings(sections), range(sections - 1, -1, -1), strict=True):
        target = video[1 + section * window :][:window]
        seen = [video[0], history[0]], history[1:3], history[3:19]
        made[section] = section_of(target, seen, places_of(window, padding))
        history = target + history
    return made


def f1_sections(latents: Tensor, window: int) -> dict[int, Section]:
    """The same for FramePack-F1: the 19 frames before the target, black where the clip has none."""
    video = list(latents.unbind(1))
    history = [torch.zeros_like(video[0])] * 19 + video
    made = {}
    for section in range((len(video) - 1) // window):
        past, target = history[section * window + 1 :][:19], video[1 + section * window :][:window]
        seen = [video[0], past[18]], past[16:18], past[:16]
        made[section] = section_of(target, seen, places_of(window, None))
    return made


@dataclass(frozen=True)
class Picture:
    """An image or a control image in its bucket."""

    colors: numpy.ndarray  # H W 3
    alpha: numpy.ndarray | None = None  # H W

    def hidden(self, latents: Tensor) -> Tensor:
        """16 1 h w, 0 where the picture is transparent."""
        if self.alpha is None:
            return latents
        size = (self.alpha.shape[1] // 8, self.alpha.shape[0] // 8)
        small = Image.fromarray(self.alpha, mode="L").resize(size, Image.Resampling.LANCZOS)
        return latents * torch.from_numpy(numpy.array(small)).float() / 255


def one_frame_section(
    encoders: Encoders,
    target: Picture,
    controls: Sequence[Picture],
    generator: torch.Generator,
    places: Sequence[int],
    target_index: int,
    post_index: int | None,
    coarse: Mapping[str, Sequence[int]],
) -> Section:
    """A picture made from control images. coarse: places of black frames, by the name of their tensor."""

    def encoded() -> Iterator[Tensor]:
        for image in (target, *controls):
            yield image.hidden(encoders.latents([image.colors], generator))

    latents, *clean = encoded()
    if post_index is not None:
        clean.append(torch.zeros_like(latents))
    return {
        "latents": latents,
        "latent_indices": torch.tensor([target_index]),
        "latents_clean": torch.cat(clean, dim=1),
        "clean_latent_indices": torch.tensor([*places, *([] if post_index is None else [post_index])]),
        **{name: torch.tensor(list(numbers)) for name, numbers in coarse.items()},
        "image_embeddings": encoders.features(controls[0].colors),
    }


# name in our caches and conditions -> argument there
TEXTS = {
    "llama_vec": "encoder_hidden_states",
    "llama_attention_mask": "encoder_attention_mask",
    "clip_l_pooler": "pooled_projections",
    "image_embeddings": "image_embeds",
}
KINDS = {
    "latents_clean": ("latents_clean", "clean_latent_indices", "indices_latents_clean"),
    "latents_clean_2x": ("latents_history_2x", "clean_latent_2x_indices", "indices_latents_history_2x"),
    "latents_clean_4x": ("latents_history_4x", "clean_latent_4x_indices", "indices_latents_history_4x"),
}


def in_diffusers(tensors: Mapping[str, Tensor]) -> HunyuanVideoFramepackTransformer3DModel:
    """A transformer of the published names, its sizes read off its tensors."""

    def count(start: str) -> int:
        return 1 + max(
            int(name.removeprefix(start + ".").split(".")[0])
            for name in tensors
            if name.startswith(start + ".")
        )

    dim, in_channels = tensors["x_embedder.proj.weight"].shape[:2]
    width = len(tensors["transformer_blocks.0.attn.norm_q.weight"])
    dit = HunyuanVideoFramepackTransformer3DModel(
        in_channels=in_channels,
        out_channels=len(tensors["proj_out.weight"]) // 4,
        num_attention_heads=dim // width,
        attention_head_dim=width,
        num_layers=count("transformer_blocks"),
        num_single_layers=count("single_transformer_blocks"),
        num_refiner_layers=count("context_embedder.token_refiner.refiner_blocks"),
        mlp_ratio=len(tensors["transformer_blocks.0.ff.net.0.proj.weight"]) / dim,
        text_embed_dim=tensors["context_embedder.proj_in.weight"].shape[1],
        pooled_projection_dim=tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        rope_axes_dim=(width // 8, width * 7 // 16, width * 7 // 16),
        has_image_proj=True,
        image_proj_dim=tensors["image_projection.up.weight"].shape[1],
        has_clean_x_embedder=True,
    )
    dit.load_state_dict(tensors)
    return dit.eval().requires_grad_(False)


def velocity(
    dit: HunyuanVideoFramepackTransformer3DModel,
    noisy: Tensor,
    timestep: Tensor,
    guidance: Tensor,
    given: Mapping[str, Tensor],
) -> Tensor:
    """1 16 F h w float32 of one sample. given: what caches and conditions hold of it, with batch dimension.

    All that a 16-bit transformer is given is rounded to 16 bits.

    It has no forward without one of the three kinds of finished latents, though the code that puts tokens in
    a row would omit one: for a kind that is not there one black frame is embedded and then dropped at
    that place.
    """
    dtype = dit.x_embedder.proj.weight.dtype

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    arguments = {there: rounded(given[here]) for here, there in TEXTS.items()}
    missing = []
    for latents, (argument, places, there) in KINDS.items():
        black = noisy.new_zeros(1, 16, given[places].shape[1] if places in given else 1, *noisy.shape[3:])
        arguments[argument] = rounded(given.get(latents, black))
        arguments[there] = given[places][0] if places in given else torch.zeros(1, dtype=torch.int64)
        missing.append(places not in given)
    pack = dit._pack_history_states

    def packed(hidden: Tensor, *rest: object) -> object:
        kept = [None if is_missing else tokens for is_missing, tokens in zip(missing, rest, strict=False)]
        return pack(hidden, *kept, *rest[len(missing) :])

    try:
        dit._pack_history_states = packed
        indices = given["latent_indices"][0]
        return dit(
            rounded(noisy),
            rounded(timestep),
            guidance=rounded(guidance),
            indices_latents=indices,
            **arguments,
            return_dict=False,
        )[0].float()
    finally:
        del dit._pack_history_states
