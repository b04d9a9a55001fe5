"""The families of the models of benchmarks/gpu.py.

A family is built from its scripts' own options. Its texts, its work and its inputs besides the noisy latents
are functions here, so that no other file depends on a family's name.
"""
# Letters: L latent tokens, T text tokens, S image tokens, D width of text states

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flops import (
    JointBlocks,
    Work,
    flux_3_work,
    gated_work,
    h3_work,
    joint_work,
    ltx_work,
    lumina_work,
    moss_image_work,
    qwen_image_21_work,
    unet_work,
    wan_work,
)
from benchmarks.gpu_rows import Row
from protocols.data import SIZES, Conditions

PATCH = 2  # latent rows and columns of a token; of HunyuanImage 1
SIGLIP_TOKENS = 729
GLYPHS = 128
CLIP_TOKENS = 77
Shape = tuple[int, int, int, int, int]  # 1 C F H W of latents


@dataclass(frozen=True)
class Drawn:
    """Random numbers from one generator on the CPU: equal for every row with the same shapes."""

    generator: torch.Generator

    def numbers(self, *shape: int) -> Tensor:
        """Return normal random numbers of this shape."""
        return torch.randn(shape, generator=self.generator)


Texts = Callable[[Any, Drawn, int], dict[str, Tensor | list[Tensor]]]


@dataclass(frozen=True)
class BenchFamily:
    """What the benchmark needs to know about a family.

    Attributes:
        room: Folder with family.py and options.py.
        record: Class of options.py for training.
        generate: Generation script.
        texts: (config of the transformer, numbers, T) -> conditions of one sample with batch dimension, as
            caches have them.
        work: (config, shape of the latents, T) -> operations of a pass.
        latents: Class of options.py for caching latents.
        train: Script with the DEFAULTS of an image trainer; "" for an ordinary one.
        inputs: (config, numbers, shape) -> what generation encodes from images, by section.
        own: Returns `Prepared.family_settings` of a video of one section.
        trained: (config, numbers, shape) -> additional tensors of a training sample's cache.
        section: Shape of a clip's latents -> shape of those that are denoised together.
        config: Family -> config of the transformer.
        audios: Whether each clip has audio.
    """

    room: str  # folder with family.py and options.py
    record: str  # of options.py: what training reads
    generate: str  # script
    texts: Texts
    # None: of families that have no row in gpu.py
    work: Callable[[Any, Shape, int], Work] | None = None
    latents: str = ""  # of options.py: what caching latents reads
    train: str = ""  # script with the DEFAULTS of an image trainer; "": an ordinary one
    inputs: Callable[[Any, Drawn, Shape], Mapping[int, Conditions]] = lambda config, drawn, shape: {0: {}}
    own: Callable[[], Any] = lambda: None
    trained: Callable[[Any, Drawn, Shape], Conditions] = lambda config, drawn, shape: {}
    section: Callable[[Shape], Shape] = lambda shape: shape
    config: Callable[[Any], Any] = lambda family: family.files.dit_header().config
    audios: bool = False


def training_family(row: Row, path: Path) -> tuple[Any, Any]:
    """Return the options of a row, as its training script reads them, and the family."""
    from training.image_options import read_image_training
    from training.options import read_training

    entry: BenchFamily = FAMILIES[row.model.family]
    options = import_module(f"{entry.room}.options")
    record = getattr(options, entry.record)
    dit = "--pretrained_model_name_or_path" if entry.train else "--dit"
    given = [dit, str(path), *TRAINING, *row.model.words, *row.options]
    if entry.train:
        defaults = import_module(entry.train).DEFAULTS
        words = [*given, "--network_train_unet_only", "--model_prediction_type", "raw"]
        read, own, _ = read_image_training(None, record, defaults, words)
    else:
        read, own, _ = read_training(None, record, given)
    return read, import_module(f"{entry.room}.family").family_for_training(own)


def generation_family(row: Row, path: Path, high: Path | None = None) -> tuple[Any, Any]:
    """Return the options of a row, as its generation script reads them, and the family."""
    entry: BenchFamily = FAMILIES[row.model.family]
    found: list[tuple[Any, Any]] = []
    second = [] if high is None else ["--dit_high_noise", str(high)]
    words = ["--dit", str(path), *second, *GENERATION, *row.model.words, *row.options]
    import_module(entry.generate).main(words, make=lambda family, options: found.append((options, family)))
    return found[0]


TRAINING = (
    *("--dataset_config", "-", "--output_dir", "-", "--output_name", "-", "--mixed_precision", "bf16"),
    *("--network_dim", "32", "--learning_rate", "1e-4"),
)
GENERATION = ("--prompt", "-", "--save_path", "-")


# Tokens


def count_tokens(shape: Shape, patch: int = PATCH) -> int:
    """Return the tokens of latents."""
    _, _, frames, rows, columns = shape
    return frames * (rows // patch) * (columns // patch)


def _framepack_tokens(shape: Shape) -> int:
    """Return the tokens of a section and the finished latents that it sees, padded to patches."""
    from frame_pack.sections import FRAMES_2X, FRAMES_4X

    _, _, frames, rows, columns = shape
    found = (frames + 2) * (rows // PATCH) * (columns // PATCH)  # the start image and the neighbor in time
    for times, past in ((2, FRAMES_2X), (4, FRAMES_4X)):
        side = PATCH * times
        found += -(-past // times) * -(-rows // side) * -(-columns // side)
    return found


# Texts


def _wan_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    return {"t5": [drawn.numbers(length, config.text_dim)]}


def _hunyuan_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    return {
        "llm": drawn.numbers(1, length, config.text_dim),
        "llm_mask": torch.ones(1, length, dtype=torch.bool),
        "clipL": drawn.numbers(1, config.pooled_dim),
        "clipL_mask": torch.ones(1, 77, dtype=torch.bool),
    }


def _framepack_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    return {
        "llama_vec": drawn.numbers(1, length, config.text_dim),
        "llama_attention_mask": torch.ones(1, length, dtype=torch.bool),
        "clip_l_pooler": drawn.numbers(1, config.pooled_dim),
    }


def _flux_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    pooled = {"l_pooled": drawn.numbers(1, config.pooled_dim)} if config.pooled_dim else {}
    mask = torch.ones(1, length, dtype=torch.int64)
    return {"t5_out": drawn.numbers(1, length, config.text_dim), "t5_attn_mask": mask, **pooled}


def _hunyuan_image_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    """Return texts without glyphs: no token of the glyph encoder is real."""
    return {
        "vlm_embed": [drawn.numbers(length, config.text_dim)],
        "vlm_mask": [torch.ones(length, dtype=torch.int64)],
        "byt5_embed": drawn.numbers(1, GLYPHS, config.glyph_dim),
        "byt5_mask": torch.zeros(1, GLYPHS, dtype=torch.int64),
    }


def _lumina_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    mask = torch.ones(1, length, dtype=torch.int64)
    return {"hidden_state": drawn.numbers(1, length, config.text_dim), "attention_mask": mask}


def _listed(key: str, several: bool = False) -> Texts:
    """Return a function for texts of a family whose caches have one tensor, as long as the text."""

    def texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
        states = (config.states,) if several else ()
        return {key: [drawn.numbers(length, *states, config.text_dim)]}

    return texts


def _qwen_image_21_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    """Return texts without references."""
    slots = torch.zeros(0, dtype=torch.int64)
    return {"vl_embed": [drawn.numbers(length, config.text_dim)], "image_slots": [slots]}


def _h3_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    """Return states of a text without images."""
    tags = torch.ones(length, dtype=torch.int64)
    return {"mmh3_hidden_states": [drawn.numbers(length, config.text_dim)], "mmh3_token_tags": [tags]}


def _sd_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    return {"hidden_state": drawn.numbers(1, CLIP_TOKENS, config["cross_attention_dim"])}


def _sdxl_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    """Return states of CLIP-L and of OpenCLIP, and the pooled state of the second, of the same width."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    first = config["cross_attention_dim"] - pooled
    return {
        "hidden_state1": drawn.numbers(1, CLIP_TOKENS, first),
        "hidden_state2": drawn.numbers(1, CLIP_TOKENS, pooled),
        "pool2": drawn.numbers(1, pooled),
    }


def _flux_2_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    return {"ctx_vec": drawn.numbers(1, length, config.text_dim)}


def _ltx_texts(config: Any, drawn: Drawn, length: int) -> dict[str, Tensor | list[Tensor]]:
    mask = torch.ones(1, length, dtype=torch.int64)
    return {
        "video_prompt_embeds": drawn.numbers(1, length, config.video.text_dim),
        "prompt_attention_mask": mask,
    }


# Images


def _wan_inputs(config: Any, drawn: Drawn, shape: Shape) -> Mapping[int, Conditions]:
    _, channels, *size = shape
    found: dict[str, Tensor] = {}
    if config.has_image:
        found["clip"] = drawn.numbers(1, 257, config.image_dim)
    if config.in_dim > channels:
        found["condition_latents"] = drawn.numbers(1, config.in_dim - channels, *size)
    return {0: found}


def _framepack_inputs(config: Any, drawn: Drawn, shape: Shape) -> Mapping[int, Conditions]:
    _, channels, _, rows, columns = shape
    image = {
        "image_embeddings": drawn.numbers(1, SIGLIP_TOKENS, config.image_dim),
        "start_latents": drawn.numbers(1, channels, 1, rows, columns),
    }
    return {0: image}


def _framepack_own() -> Any:
    from frame_pack.requests import FramePackRequest

    return FramePackRequest((Path("-"),))


def _without_start(shape: Shape) -> Shape:
    """Return the shape without the first frame, which is given."""
    batch, channels, frames, rows, columns = shape
    return batch, channels, frames - 1, rows, columns


def _framepack_trained(config: Any, drawn: Drawn, shape: Shape) -> Conditions:
    """Return the cached section of a clip of one section: its context, and its index in time."""
    from frame_pack.caching import clip_sections
    from frame_pack.sections import ANTI_DRIFTING

    _, channels, frames, rows, columns = shape
    clip = drawn.numbers(1, channels, 1 + frames, rows, columns)
    features = drawn.numbers(SIGLIP_TOKENS, config.image_dim)
    (entry,) = clip_sections(clip, features, ANTI_DRIFTING, frames)
    return {name: tensor.unsqueeze(0) for name, tensor in entry.tensors.items() if name != "latents"}


def _sdxl_trained(config: Any, drawn: Drawn, shape: Shape) -> Conditions:
    """Return the sizes of an image that was neither resized nor cropped, in pixels."""
    height, width = (8 * side for side in shape[-2:])
    return {SIZES: torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)}


def _unet_config(family: Any) -> Any:
    return family.files.unet_config


def _unet_of(config: Any, shape: Shape, text: int) -> Work:
    return unet_work(config, rows=shape[-2], columns=shape[-1], text_tokens=CLIP_TOKENS)


FAMILIES = {
    "wan": BenchFamily(
        *("wan", "WanTrainingOptions", "wan_generate_video", _wan_texts),
        work=lambda config, shape, text: wan_work(config, count_tokens(shape)),
        inputs=_wan_inputs,
        latents="WanLatentCachingOptions",
    ),
    "hunyuan_video": BenchFamily(
        *("hunyuan_model", "HunyuanTrainingOptions", "hv_generate_video", _hunyuan_texts),
        work=lambda config, shape, text: joint_work(config, count_tokens(shape), text),
        latents="HunyuanLatentCachingOptions",
    ),
    "framepack": BenchFamily(
        *("frame_pack", "FramePackTrainingOptions", "fpack_generate_video", _framepack_texts),
        work=lambda config, shape, text: joint_work(config, _framepack_tokens(shape), SIGLIP_TOKENS + text),
        inputs=_framepack_inputs,
        own=_framepack_own,
        trained=_framepack_trained,
        section=_without_start,
    ),
    "flux": BenchFamily(
        *("flux", "FluxTrainingOptions", "flux_generate_image", _flux_texts),
        # a LoRA of FLUX.1 trains the gates too: their gradients depend on the last layers' outputs
        work=lambda config, shape, text: replace(joint_work(config, count_tokens(shape), text), last=0.0),
        train="flux_train_network",
    ),
    "hunyuan_image": BenchFamily(
        *("hunyuan_image", "HunyuanImageTrainingOptions", "hunyuan_image_generate_image"),
        _hunyuan_image_texts,
        work=lambda config, shape, text: joint_work(config, count_tokens(shape, patch=1), text),
        train="hunyuan_image_train_network",
    ),
    "lumina": BenchFamily(
        *("lumina", "LuminaTrainingOptions", "lumina_generate_image", _lumina_texts),
        work=lambda config, shape, text: lumina_work(config, count_tokens(shape), text),
        train="lumina_train_network",
    ),
    "flux_2": BenchFamily("flux_2", "Flux2TrainingOptions", "flux_2_generate_image", _flux_2_texts),
    "flux_3": BenchFamily(
        *("flux_3", "Flux3TrainingOptions", "flux_3_generate_image", _listed("ctx_vec")),
        work=lambda config, shape, text: flux_3_work(config, count_tokens(shape, patch=1), text),
    ),
    "krea2": BenchFamily(
        *("krea2", "Krea2TrainingOptions", "krea2_generate_image", _listed("krea2_vl_embed", several=True)),
        work=lambda config, shape, text: gated_work(config, count_tokens(shape), text),
    ),
    "ltx_2": BenchFamily(
        *("ltx_2", "Ltx2TrainingOptions", "ltx2_generate_video", _ltx_texts),
        work=lambda config, shape, text: ltx_work(config, count_tokens(shape, patch=1), text),
    ),
    "moss_image": BenchFamily(
        *("moss_image", "MossImageTrainingOptions", "moss_image_generate_image", _listed("qwen3_5_embed")),
        work=lambda config, shape, text: moss_image_work(config, count_tokens(shape, patch=1), text),
    ),
    "qwen_image": BenchFamily(
        *("qwen_image", "QwenImageTrainingOptions", "qwen_image_generate_image", _listed("vl_embed")),
        work=lambda config, shape, text: joint_work(
            JointBlocks(config.dim, config.ffn_dim, config.num_layers), count_tokens(shape), text
        ),
    ),
    "qwen_image_21": BenchFamily(
        *("qwen_image_21", "QwenImage21TrainingOptions", "qwen_image_21_generate_image"),
        _qwen_image_21_texts,
        work=lambda config, shape, text: qwen_image_21_work(config, count_tokens(shape, patch=1), text),
    ),
    "minimax_h3": BenchFamily(
        *("minimax_h3", "H3TrainingOptions", "minimax_h3_generate_video", _h3_texts),
        work=lambda config, shape, text: h3_work(config, count_tokens(shape), text),
        audios=True,
    ),
    "sd1": BenchFamily(
        *("stable_diffusion.sd1", "Sd1TrainingOptions", "gen_img", _sd_texts),
        work=_unet_of,
        train="train_network",
        config=_unet_config,
    ),
    "sdxl": BenchFamily(
        *("stable_diffusion.sdxl", "SdxlTrainingOptions", "gen_img", _sdxl_texts),
        work=_unet_of,
        train="sdxl_train_network",
        trained=_sdxl_trained,
        config=_unet_config,
    ),
    "z_image": BenchFamily(
        *("z_image", "ZImageTrainingOptions", "zimage_generate_image", _listed("llm_embed")),
        work=lambda config, shape, text: lumina_work(config, count_tokens(shape), text),
    ),
}
