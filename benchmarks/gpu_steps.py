"""The timed work of benchmarks/gpu.py and its probes, in the process that loads the model.

Families are built from their scripts' own options; texts, work and inputs of a family are functions here, so
that no other file depends on its name. Then follow the files that rows load, the loops' own steps, caching,
profiles, short probes of kernels, and the measurement of one row.
"""
# Letters: L latent tokens, T text tokens, S image tokens, D width of text states

import gc
import os
import re
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ceilings
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
from benchmarks.gpu_rows import GENERATION, GIB, LATENTS, LOADING, TEXTS, TRAINING, Row
from benchmarks.noise import NoisyFamily, fill_with_noise
from benchmarks.process_memory import STATUS, is_known, peak, start_of_peak
from checkpoints.stored.forms import prepare
from dataset.options import read_latent_caching
from generation.denoise import make_latents
from generation.experts import ExpertOffloader, list_expert_order
from generation.memory import predict_denoising
from generation.network_setup import dit_loader
from modules.attention.attend import attend
from modules.devices import select_device
from networks.adapter import make_network
from protocols.data import (
    AUDIO_LATENTS,
    HAS_AUDIO,
    SIZES,
    AudioVideoShapes,
    Batch,
    Conditions,
    MediaBatch,
    MediaTable,
)
from protocols.family import get_audio_spec
from protocols.loading import TensorInfo
from protocols.requests import Prepared, Request, resolve_request
from protocols.steps import EncodedPrompts
from runtime.network_setup import make_host_weights
from runtime.offload.host_memory import allocate
from runtime.planning.dry_run import modules_in
from runtime.planning.memory_plan import workspace
from tests.manifests import tensor_list, write_hollow
from training.experts import choose_placement, set_up_network
from training.loss import NoisyAudio, NoisyBatch
from training.optimizers.optimizer import find_averaging_optimizer, make_optimizer
from training.planning.memory import predict_memory
from training.planning.rehearsal import make_autocast
from training.targets.passes import training_loss

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
    given = [dit, str(path), *TRAINING_WORDS, *row.model.words, *row.options]
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
    words = ["--dit", str(path), *second, *GENERATION_WORDS, *row.model.words, *row.options]
    import_module(entry.generate).main(words, make=lambda family, options: found.append((options, family)))
    return found[0]


TRAINING_WORDS = (
    *("--dataset_config", "-", "--output_dir", "-", "--output_name", "-", "--mixed_precision", "bf16"),
    *("--network_dim", "32", "--learning_rate", "1e-4"),
)
GENERATION_WORDS = ("--prompt", "-", "--save_path", "-")


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


# --- The files that the rows of benchmarks/gpu.py load: empty ones of full size, and one with real bytes
# ------------------------------------------------------------------------------------------------------------

TRANSFORMERS = (TRAINING, GENERATION, LOADING)
SHARED = Path("/dev/shm")
PIECE = 1 << 24  # numbers of 16 bits, written again and again


@contextmanager
def folder_for(row: Row, asked: Path | None) -> Iterator[Path]:
    """Yield the requested folder, which is kept, or a temporary one for the files of a row."""
    if asked is not None:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked
        return
    with tempfile.TemporaryDirectory(dir=None if row.kind == LOADING else memory_folder()) as made:
        yield Path(made)


def memory_folder() -> Path | None:
    """Return a folder whose files are in memory (Linux), for files without content; None without one.

    There, holes are read at once and take no space. A disk's file system fills the system's cache with zeros
    first: 6 GB took 48 s instead of 2 in a virtual machine whose memory grows as it is used.
    """
    return SHARED if SHARED.is_dir() and os.access(SHARED, os.W_OK) else None


def lay_out(row: Row, folder: Path) -> tuple[Path, Path | None]:
    """Write the missing files of a row: its model, and that of the expert for high noise.

    All except those of the loading rows are holes: they take no space and are read as zeros. Transformers are
    in bf16, although some releases have tensors in float32.
    """
    model = row.model
    names = (
        [model.manifest, f"{model.high}-high"] if model.high and row.kind == GENERATION else [model.manifest]
    )
    paths = []
    for name in names:
        real = row.kind == LOADING
        path = folder / f"{name}{'-real' if real else ''}.safetensors"
        if not path.exists():
            tensors = tensor_list(name.removesuffix("-high"))
            if row.kind in TRANSFORMERS:
                tensors = {key: ("BF16", shape) for key, (_, shape) in tensors.items()}
            write_hollow(path, tensors)
            if real:
                fill(path)
        paths.append(path)
    return paths[0], paths[1] if len(paths) > 1 else None


def vae_of(row: Row, folder: Path) -> tuple[str, ...]:
    """Return the option of a family that reads the size of latents from its VAE, with an empty file."""
    if not row.model.vae:
        return ()
    return "--vae", str(write_hollow(folder / "vae.safetensors", tensor_list(row.model.vae)))


def fill(path: Path) -> None:
    """Write random bf16 numbers after the header of an empty file, and wait until they are on disk.

    The same numbers repeat every 32 MiB: drawing them is slower than the disk.
    """
    numbers = torch.randn(PIECE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    piece = memoryview(numbers.view(torch.uint8).numpy())
    with path.open("r+b") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        left = path.stat().st_size - file.seek(8 + header)
        while left > 0:
            left -= file.write(piece[: min(left, len(piece))])
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> bool:
    """Ask the system to drop a file from its cache; return whether it supports that (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


# --- The timed work of the rows of benchmarks/gpu.py that train and generate: the loops' own steps
# ------------------------------------------------------------------------------------------------------------

SEED = 0


@dataclass(frozen=True)
class Bench:
    """A prepared model and the work of one measured call."""

    call: Callable[[], object]
    warm_up: Callable[[], object]  # the first call: it may compile, or be shorter
    operations: float  # of the call, recomputation included
    model_operations: float  # without recomputation
    planned: float  # bytes that the plan predicts for the device; 0: there is no plan
    loading: float  # seconds
    per: float = 1.0  # steps, clips or texts that a call makes
    losses: list[Tensor] = field(default_factory=list)  # of all calls so far
    norms: list[Tensor] = field(default_factory=list)  # of all gradients together, likewise
    whole: float = 1.0  # steps of a finished video or image
    held: object = None  # what must live as long as the calls


def train_steps(row: Row, path: Path, device: torch.device) -> Bench:
    """Prepare training steps of a LoRA of rank 32 on a random sample, which is the same in all rows.

    A step is loss, backward pass, clipping and optimizer step, as in the training loop.
    """
    options, family = training_family(row, path)
    batch = random_batch(row, family)
    planned = row.planned or plan_of_training(row, options, family, device)
    begun = time.monotonic()
    host = make_host_weights(family.dit, options.speed.swap, device)
    form = options.speed.fp8.quantization
    placement = choose_placement(options, device, form and prepare(form, device))
    dit = NoisyFamily(family).load_dit(replace(placement, host_weights=host)).requires_grad_(False)
    loading = time.monotonic() - begun
    assert options.network is not None
    network = make_network(options.network, family.lora_module, dit, seed=SEED)
    network.module.to(device)
    set_up_network(dit, family.dit, options.loop, device, options.speed.compilation.choice, host)
    parameters = list(network.parameters())  # clipped at each step
    groups, _ = network.parameter_groups(options.optimizer.learning_rate)
    optimizer, _ = make_optimizer(options.optimizer, groups)
    if (averaging := find_averaging_optimizer(optimizer)) is not None:
        averaging.train()
    autocast, batch = make_autocast(options, device), batch.to(device)
    losses: list[Tensor] = []
    norms: list[Tensor] = []

    def step() -> None:
        loss = training_loss(family, dit, batch, autocast)
        losses.append(loss.detach())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.optimizer.max_grad_norm)
        norms.append(norm.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Bench(
        step, step, *call_operations(row, options, family), planned, loading, losses=losses, norms=norms
    )


def generation(row: Row, path: Path, device: torch.device, high: Path | None = None) -> Bench:
    """Prepare some steps of the denoising loop with the default guidance, on random conditions.

    `high` is the file of the expert for high noise. The first call has two steps fewer or, with experts, as
    many: all must have run once before the time counts.
    """
    options, family = generation_family(row, path, high)
    prepared, prompts, inputs = random_request(row, family)
    experts = len(family.experts)
    planned = row.planned or plan_of_generation(row, options, family, path, device)
    noisy: Any = NoisyFamily(family)
    loader = dit_loader(noisy, (), device, options)
    dits = ExpertOffloader(family.experts, device, loader, loader.load_to_host, keep=True)
    begun = time.monotonic()
    phase = ExitStack()  # stays open
    dit_at = phase.enter_context(dits.phase(list_expert_order(noisy, [prepared] * 2)))
    loading = time.monotonic() - begun

    def make(asked: Prepared) -> Callable[[], Tensor]:
        return lambda: make_latents(
            family, dit_at, asked, prompts, inputs, device, split=options.splits_guidance
        )

    first = prepared if experts > 1 else replace(prepared, steps=max(prepared.steps - 2, 1))
    return Bench(
        *(make(prepared), make(first), *call_operations(row, options, family), planned, loading),
        per=prepared.steps,
        whole=family.defaults.steps,
        held=phase,  # else its end would put the network away
    )


def plan_of_training(row: Row, options: Any, family: Any, device: torch.device) -> float:
    """Return the bytes of the device that the plan predicts for a training step."""
    prediction = predict_memory(family, options, random_batch(row, family), device)
    return prediction.device_bytes(options.speed.swap.number)


def plan_of_generation(row: Row, options: Any, family: Any, path: Path, device: torch.device) -> float:
    """Return the bytes of the device that the plan predicts for denoising with the network in `path`."""
    prepared, prompts, inputs = random_request(row, family)
    extra = workspace(device, is_training=False)
    plan = predict_denoising(family, options, prepared, prompts, inputs, extra)
    further = (len(family.experts) - 1) * get_file_size(path)
    return plan.phase(options.speed.swap.number).device + further


def get_file_size(path: Path) -> int:
    """Return the size of a file: what an expert takes on the device while the other one works."""
    return path.stat().st_size


def section_of(row: Row, family: Any) -> Shape:
    """Return the shape of the latents that are denoised together."""
    size = row.size
    section: Shape = FAMILIES[row.model.family].section(
        family.latent.shape(size.frames, size.height, size.width)
    )
    return section


def call_operations(row: Row, options: Any, family: Any) -> tuple[float, float]:
    """Return the operations of a measured call, with recomputation and without."""
    entry = FAMILIES[row.model.family]
    count = entry.work
    assert count is not None
    audio = audio_shape(row, family)
    # tokens of sound see all and are seen by all, as those of the text
    further_tokens = row.text_tokens + (audio[1] * audio[2] if audio else 0)
    work = count(entry.config(family), section_of(row, family), further_tokens)
    if row.kind == GENERATION:
        made = row.steps * passes_of(family) * work.forward
        return made, made
    loop = options.loop
    keeps = loop.gradient_checkpointing_keep is not None
    # compiled blocks and products with 8-bit weights save tensors at their end: all of it is recomputed
    ends_early = options.speed.compilation.choice is None and options.speed.fp8.quantization is None
    made = work.lora_step(loop.gradient_checkpointing, keeps, ends_early)
    return made, work.lora_step(checkpointing=False)


def passes_of(family: Any) -> int:
    """Return the number of passes per step of generation: two with guidance."""
    default = family.defaults
    return (
        2 if any(scale != 1 for scale in (default.guidance_scale, *default.expert_guidance.values())) else 1
    )


def audio_shape(row: Row, family: Any) -> tuple[int, int, int] | None:
    """Return the shape of the latents of a clip's audio, C T M; None for a model without audio."""
    if not FAMILIES[row.model.family].audios:
        return None
    spec = get_audio_spec(family)
    assert spec is not None
    return spec.shape(row.size.frames, family.defaults.fps)


def random_batch(row: Row, family: Any) -> NoisyBatch:
    """Return a batch of one sample as the feed does: latents, texts, noise, and its audio."""
    drawn, entry = Drawn(torch.Generator().manual_seed(SEED)), FAMILIES[row.model.family]
    shape, config = section_of(row, family), entry.config(family)
    tensors = {
        "latents": drawn.numbers(*shape),
        **entry.texts(config, drawn, row.text_tokens),
        **entry.trained(config, drawn, shape),
    }
    one = torch.ones(1)
    noise = drawn.numbers(*shape)
    size, audio = audio_shape(row, family), None
    if size is not None:
        tensors |= {AUDIO_LATENTS: drawn.numbers(1, *size), HAS_AUDIO: one}
        audio = NoisyAudio(drawn.numbers(1, *size), one / 2, one * 500, one)
    return NoisyBatch(Batch(tensors, ("",), ("random",)), noise, one / 2, one * 500, one, audio=audio)


def random_request(row: Row, family: Any) -> tuple[Prepared, Any, Any]:
    """Return a request for a few steps, with its texts and its image as the encoders return them."""
    drawn, entry = Drawn(torch.Generator().manual_seed(SEED)), FAMILIES[row.model.family]
    size, config, default = row.size, entry.config(family), family.defaults
    texts = [without_batch(entry.texts(config, drawn, row.text_tokens)) for _ in range(2)]
    inputs = entry.inputs(config, drawn, family.latent.shape(size.frames, size.height, size.width))
    request = Request("", SEED, steps=row.steps)
    prepared = resolve_request(
        request,
        default,
        (size.width, size.height, size.frames),
        flow_shift=default.flow_shift or 3.0,
        default_negative="",
        experts=family.experts,
    )
    prepared = replace(prepared, family_settings=entry.own())
    if (audio := audio_shape(row, family)) is not None:
        _, *image = section_of(row, family)
        joint = AudioVideoShapes(tuple(image), audio)  # type: ignore[arg-type]  # four numbers
        prepared = replace(prepared, audio_video_shapes=joint, audio_shift=family.noise.audio_shift)
    return prepared, {0: EncodedPrompts(*texts)}, inputs


def without_batch(conditions: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor | list[Tensor]]:
    """Return conditions as a text encoder returns them: lists stay, tensors lose their first axis."""
    return {name: value if isinstance(value, list) else value[0] for name, value in conditions.items()}


# --- The timed work of the caching rows of benchmarks/gpu.py: VAEs on random clips, text encoders on tokens
# ------------------------------------------------------------------------------------------------------------

CLIPS = 2  # encoded in a call, one after the other
Encode = Callable[[], object]


def latents(row: Row, path: Path, device: torch.device) -> Bench:
    """Prepare the encoding of clips, from frames in host memory to what a cache file holds."""
    room = FAMILIES[row.model.family].room
    options, record = import_module(f"{room}.options"), FAMILIES[row.model.family].latents
    words = ["--dataset_config", "-", "--vae", str(path), *row.options]
    *_, own = read_latent_caching(None, getattr(options, record), words)
    family = import_module(f"{room}.family").family_for_latent_caching(own)
    begun = time.monotonic()
    encoders = family.media_encoders(device, images=False)
    loading = time.monotonic() - begun
    for network in modules_in(encoders):
        fill_with_noise(network)
    generator = torch.Generator().manual_seed(SEED)
    size = row.size
    frames = torch.randint(
        0, 256, (1, size.frames, size.height, size.width, 3), dtype=torch.uint8, generator=generator
    )
    media = MediaBatch(frames, ("clip",), ((0, size.frames),), table=MediaTable(has_control=False))

    @torch.no_grad()
    def encode(clips: int) -> None:
        for _ in range(clips):
            family.encode_media(encoders, media)

    return Bench(lambda: encode(CLIPS), lambda: encode(1), 0, 0, 0, loading, per=CLIPS)


def texts(row: Row, path: Path, device: torch.device) -> Bench:
    """Prepare the encoding of texts, from token ids to states in host memory."""
    begun = time.monotonic()
    network, encode, count = TEXT_NETWORKS[row.model.family](path, device, row.text_tokens)
    loading = time.monotonic() - begun
    fill_with_noise(network)
    call = torch.no_grad()(encode)
    return Bench(call, call, 0, 0, 0, loading, per=count)


def _umt5(path: Path, device: torch.device, length: int) -> tuple[Any, Encode, int]:
    """Load umT5, which encodes as many texts at once as in caching."""
    from encoders.t5_network import load_t5
    from encoders.text_encoder import TOKENS_AT_ONCE
    from wan.t5 import UMT5

    t5 = load_t5(path, device, UMT5)
    ids = torch.randint(1, t5.token_embedding.num_embeddings, (TOKENS_AT_ONCE // length, length))
    return t5, lambda: [states.cpu() for states in t5(list(ids.to(device)))], len(ids)


def _llama(path: Path, device: torch.device, length: int) -> tuple[Any, Encode, int]:
    """Load HunyuanVideo's Llama; texts follow the template."""
    from encoders.language_models import LLAMA, load_language_model
    from encoders.language_states import language_states
    from hunyuan_model.options import SKIP_LAYERS
    from hunyuan_model.text_encoders import LLAVA_SETTINGS, VIDEO_TEMPLATE

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    llama: Any = load_language_model(path, LLAMA, device, dtype, (-1 - SKIP_LAYERS,))
    start = VIDEO_TEMPLATE.crop_start or 0
    shape = (LLAVA_SETTINGS.batch_size, start + length)
    ids, mask = (
        torch.randint(1, llama.embed_tokens.num_embeddings, shape),
        torch.ones(shape, dtype=torch.int64),
    )

    def encode() -> torch.Tensor:
        return language_states(llama, llama.embed_tokens(ids.to(device)), mask.to(device))[:, start:].cpu()

    return llama, encode, len(ids)


TEXT_NETWORKS = {"wan": _umt5, "hunyuan_video": _llama}


# --- Where the time of a step goes: the kernels of a profile in a few groups
# ------------------------------------------------------------------------------------------------------------

ATTENTION, PRODUCTS, THIN = "attention", "matrix products", "thin products (LoRA)"
ELEMENTWISE, COPIES, IDLE, OTHER = "elementwise and norms", "copies", "host gaps (device idle)", "other"
GROUPS = (ATTENTION, PRODUCTS, THIN, ELEMENTWISE, COPIES, OTHER)
THIN_SIDE = 128  # the largest rank of a LoRA; a matrix with a smaller side does little work per byte
LARGEST = 20  # kernels listed
# kernels and operators by parts of their names; the first pattern that fits counts
NAMES = (
    # inductor's own kernels have the names of all operators that they touch, attention's too
    (ELEMENTWISE, r"^triton_(poi|red|per)_"),
    (PRODUCTS, r"^triton_(tem|mm)_"),
    (COPIES, r"memcpy|memset|aten::copy_$|aten::_to_copy$"),
    (ATTENTION, r"flash|fmha|sdpa|scaled_dot_product|efficient_attention|_attention_|sage"),
    (
        PRODUCTS,
        r"gemm|nvjet|cutlass|xmma|cublas|matmul|splitk|conv(?!ert)|wgrad|dgrad"
        r"|aten::(addmm|mm|bmm|baddbmm|linear|_scaled_mm|mkldnn)",
    ),
    (
        ELEMENTWISE,
        r"elementwise|triton_|norm|reduce|softmax|foreach|multi_tensor|index|scatter|gather|cat|fill|scan|sort"
        r"|aten::(add|mul|div|sub|sum|mean|neg|exp|log|pow|sqrt|rsqrt|silu|gelu|sigmoid|tanh|where|stack|var"
        r"|square|clamp|lerp|random|normal|arange|zero|clone|select|slice|embedding|native|amax|abs|ones|empty)",
    ),
)
PATTERNS = tuple((group, re.compile(pattern, re.IGNORECASE)) for group, pattern in NAMES)
MATRICES = re.compile(r"aten::(addmm|mm|bmm|baddbmm|linear|_scaled_mm)")


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran on the device, or an operator's own time on a CPU. Times are in microseconds."""

    name: str
    start: float
    end: float
    operator: str = ""  # that asked for it
    shapes: tuple[tuple[int, ...], ...] = ()  # of its inputs
    size: int = 0  # bytes that it moved, as far as is known

    @property
    def time(self) -> float:
        """Duration in microseconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Profile:
    """Kernels of some calls, and the microseconds from the first to the last."""

    kernels: Sequence[Kernel]
    wall: float
    busy: float  # in which at least one kernel ran


@dataclass
class Sum:
    """Totals of equal kernels, or of a group."""

    time: float = 0.0
    count: int = 0
    size: int = 0
    names: dict[str, float] = field(default_factory=dict)

    def add(self, kernel: Kernel) -> None:
        """Add a kernel to the totals."""
        self.time += kernel.time
        self.count += 1
        self.size += kernel.size
        self.names[kernel.name] = self.names.get(kernel.name, 0.0) + kernel.time


def classify_kernel(kernel: Kernel) -> str:
    """Return the group of a kernel, by its name or by that of the operator that started it.

    A matrix product is thin if one of its sides is at most 128, which is a LoRA's rank in a transformer.
    """
    found = next((group for group, pattern in PATTERNS if pattern.search(kernel.name)), OTHER)
    if found == OTHER:
        found = next((group for group, pattern in PATTERNS if pattern.search(kernel.operator)), OTHER)
    return THIN if found == PRODUCTS and is_thin(kernel) else found


def is_thin(kernel: Kernel) -> bool:
    """Return whether a product's matrices have a side of at most 128; products with a vector do not count."""
    if not MATRICES.match(kernel.operator or kernel.name):
        return False
    matrices = [shape for shape in kernel.shapes if len(shape) >= 2]
    sides = [side for shape in matrices for side in shape[-2:]]
    return len(matrices) >= 2 and 1 < min(sides) <= THIN_SIDE


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Return the microseconds in which at least one of the kernels ran; streams may overlap."""
    found, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda each: each.start):
        found += max(kernel.end - max(kernel.start, until), 0.0)
        until = max(until, kernel.end)
    return found


def sums_by(kernels: Iterable[Kernel], key: Callable[[Kernel], str]) -> dict[str, Sum]:
    """Add up the kernels with the same key, the largest sum first."""
    sums: dict[str, Sum] = {}
    for kernel in kernels:
        sums.setdefault(key(kernel), Sum()).add(kernel)
    return dict(sorted(sums.items(), key=lambda item: -item[1].time))


def report(found: Profile, calls: int) -> str:
    """Return the tables of a profile: the groups, then the largest kernels. Times are per call."""
    groups = sums_by(found.kernels, classify_kernel)
    lines = ["| group | ms a step | share | kernels | GB/s | largest |", "|---|---|---|---|---|---|"]
    for name in GROUPS:
        if name in groups:
            one = groups[name]
            largest = max(one.names, key=lambda each: one.names[each])
            lines.append(_line(name, one, found.wall, calls, f" {short(largest)} |"))
    idle = max(found.wall - found.busy, 0.0)
    lines.append(f"| {IDLE} | {idle / 1e3 / calls:.2f} | {idle / max(found.wall, 1e-9):.1%} | - | - | - |")
    lines.append(f"| all | {found.wall / 1e3 / calls:.2f} | 100.0% | {len(found.kernels) // calls} | - | - |")
    lines += ["", "| kernel | ms a step | share | runs | GB/s | group |", "|---|---|---|---|---|---|"]
    for name, one in list(
        sums_by(found.kernels, lambda kernel: f"{classify_kernel(kernel)}\n{kernel.name}").items()
    )[:LARGEST]:
        group, kernel = name.split("\n", 1)
        lines.append(_line(short(kernel), one, found.wall, calls, f" {group} |"))
    return "\n".join(lines)


def _line(name: str, one: Sum, wall: float, calls: int, rest: str) -> str:
    moved = f"{one.size / one.time / 1e3:.0f}" if one.size and one.time else "-"
    share = one.time / max(wall, 1e-9)
    return f"| {name} | {one.time / 1e3 / calls:.2f} | {share:.1%} | {one.count // calls} | {moved} |{rest}"


def short(name: str, length: int = 80) -> str:
    """Return a kernel's name, shortened for a table."""
    plain = name.replace("|", "/").replace("\n", " ")
    return plain if len(plain) <= length else f"{plain[: length - 3]}..."


# From torch's profiler


def profile_calls(call: Callable[[], object], calls: int, device: torch.device) -> Profile:
    """Profile some calls; earlier calls have compiled and allocated what is needed."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    if cuda:
        assert found.profiler is not None
        assert found.profiler.kineto_results is not None
        return read_device(found.profiler.kineto_results.events())
    return read_cpu(found.events() or [])


def read_device(events: Sequence[Any]) -> Profile:
    """Join the kernels of a device with the operators that started them.

    `events` are those of the profiler (torch._C._autograd._KinetoEvent); those of releases after 2.11 contain
    more, which is not needed.
    """
    operators = {
        event.correlation_id(): event
        for event in events
        if _is_on_cpu(event.device_type()) and not event.linked_correlation_id() and event.shapes()
    }
    kernels = [
        _kernel(event, operators.get(event.linked_correlation_id()))
        for event in events
        if not _is_on_cpu(event.device_type()) and not _is_annotation(event)
    ]
    if not kernels:
        return Profile((), 0.0, 0.0)
    wall = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return Profile(kernels, wall, busy_time(kernels))


def _kernel(event: Any, operator: Any) -> Kernel:
    name, start, end = event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3
    if operator is None:
        return Kernel(name, start, end)
    shapes = _shapes(operator.shapes())
    types = operator.dtypes() if hasattr(operator, "dtypes") else ()
    size = 0 if MATRICES.match(operator.name()) else _bytes(operator.shapes(), types)
    return Kernel(name, start, end, operator.name(), shapes, size)


def read_cpu(events: Sequence[Any]) -> Profile:
    """Return the CPU's operators with their own times. `events` are FunctionEvents."""
    kernels = _operators(events)
    if not kernels:
        return Profile((), 0.0, 0.0)
    start = min(event.time_range.start for event in events)
    wall = max(event.time_range.end for event in events) - start
    return Profile(kernels, wall, min(sum(kernel.time for kernel in kernels), wall))


def _operators(events: Sequence[Any]) -> list[Kernel]:
    found = []
    for event in events:
        own = event.self_cpu_time_total
        if own > 0:
            start = event.time_range.start
            shapes = _shapes(event.input_shapes or ())
            found.append(Kernel(event.name, start, start + own, event.name, shapes))
    return found


def _is_on_cpu(device_type: Any) -> bool:
    return str(device_type).endswith("CPU")


def _is_annotation(event: Any) -> bool:
    """Return whether an event is not a kernel, but a named range of the program."""
    return bool(event.is_user_annotation()) if hasattr(event, "is_user_annotation") else False


def _shapes(given: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of tensors among the inputs of an operator."""
    return tuple(
        tuple(shape)
        for shape in given
        if isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape)
    )


ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}


def _bytes(shapes: Sequence[Sequence[int]], types: Sequence[str]) -> int:
    """Return the bytes of an operator's inputs, its minimum to read; 0 if their types are not known."""
    if len(types) != len(shapes):
        return 0
    found = 0
    for shape, kind in zip(shapes, types, strict=True):
        if shape and kind in ITEM_BYTES:
            size = ITEM_BYTES[kind]
            for side in shape:
                size *= side
            found += size
    return found


# --- Short probes of a GPU, each done in seconds: what a kernel does, not how long a run takes
# ------------------------------------------------------------------------------------------------------------
# The open question is cuDNN's attention. On an H100 (torch 2.11) the gradients of two samples of 754
# tokens in one call were NaN, those of one sample never; since then `modules.attention.sdpa` gives cuDNN
# one sample at a time if there are gradients. That fix has not run on a GPU yet. To be tried:
#
# 1. `cudnn_batches`: for which lengths and batches are gradients NaN? If for none, torch or cuDNN has
# fixed it, and the loop over samples can end at that version. If only for lengths that are not a multiple
# of 64 or 128, only those need it. 2. `cudnn_one_by_one`: are results finite and right with the fix for
# all of these? If not, cuDNN has to leave `kernels` if there are gradients. 3. `cudnn_loop_cost`: what
# does the loop cost at 4 x 4,096 tokens, against one call and FlashAttention? If it costs more than
# FlashAttention does, batches should use that. 4. `torch_own_choice`: which kernel does torch itself
# select for a batch, as diffusers' processors would use it? The U-Nets of Stable Diffusion do not use
# those on CUDA for this reason.

LENGTHS = (8, 77, 128, 500, 704, 754, 1024)
BATCHES = (1, 2, 3)
HEADS, WIDTH = 2, 64
Figures = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """A short measurement: its name, its estimated seconds, and a function from a device to figures."""

    name: str
    seconds: float
    ask: Callable[[torch.device], Figures]


def run_probe(probe: Probe, device: str) -> Figures:
    """Return the figures of a probe with its seconds, or the reason if it failed."""
    begun = time.monotonic()
    try:
        found = probe.ask(select_device(device))
    except Exception as error:  # of any kernel
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**found, "took": round(time.monotonic() - begun, 1)}


def draw_inputs(device: torch.device, batch: int, length: int) -> list[Tensor]:
    """Return query, key, value and a gradient of the result, B N L D in bf16 each, of a fixed seed."""
    generator = torch.Generator().manual_seed(length)
    shape = (batch, HEADS, length, WIDTH)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4)]


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # B N L D -> B N L D


def worst_error(attention: Attention, inputs: list[Tensor]) -> float:
    """Return the largest relative error of result and gradients against float32; NaN if a value is NaN."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        *sources, gradient = (tensor.detach().to(dtype) for tensor in inputs)
        for source in sources:
            source.requires_grad_()
        if dtype == torch.float32:
            with sdpa_kernel(SDPBackend.MATH):
                output = functional.scaled_dot_product_attention(*sources)
        else:
            output = attention(*sources)
        results.append([output.detach(), *torch.autograd.grad(output, sources, gradient)])
    errors = [
        ((found.float() - exact).norm() / exact.norm()).item() for found, exact in zip(*results, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


def with_kernel(kernel: SDPBackend) -> Attention:
    """Return attention with a single kernel of torch."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return functional.scaled_dot_product_attention(query, key, value)

    return attention


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention as every family does."""
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attend(*swapped).transpose(1, 2)


def _measure_errors(attention: Attention, device: torch.device) -> Figures:
    """Return which sizes give NaN, and the largest error of all others."""
    wrong, errors = [], [0.0]
    for length in LENGTHS if device.type == "cuda" else LENGTHS[:2]:
        for batch in BATCHES:
            error = worst_error(attention, draw_inputs(device, batch, length))
            if error != error:
                wrong.append(f"{batch} x {length}")
            else:
                errors.append(error)
    return {"nan": wrong, "worst": round(max(errors), 5)}


def cudnn_batches(device: torch.device) -> Figures:
    """Find the batches and lengths for which cuDNN's gradients are NaN, with the versions."""
    kernel = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    return {**versions, **_measure_errors(with_kernel(kernel), device)}


def cudnn_one_by_one(device: torch.device) -> Figures:
    """Find the same for attention as the families use it."""
    return _measure_errors(ours, device)


def cudnn_loop_cost(device: torch.device) -> Figures:
    """Measure the milliseconds of forward and backward: looped, in one call, with FlashAttention."""
    is_cuda = device.type == "cuda"
    length = 4096 if is_cuda else 64
    inputs = draw_inputs(device, 4, length)
    *sources, gradient = inputs
    for source in sources:
        source.requires_grad_()

    def milliseconds(attention: Attention) -> float:
        def call() -> None:
            torch.autograd.grad(attention(*sources), sources, gradient)

        return round(1000 * seconds_of(call, device), 3)

    math = SDPBackend.MATH
    return {
        "looped": milliseconds(ours),
        "one call": milliseconds(with_kernel(SDPBackend.CUDNN_ATTENTION if is_cuda else math)),
        "flash": milliseconds(with_kernel(SDPBackend.FLASH_ATTENTION if is_cuda else math)),
    }


def torch_own_choice(device: torch.device) -> Figures:
    """Find which operators torch itself selects for two samples with gradients."""
    *sources, gradient = draw_inputs(device, 2, 754)
    for source in sources:
        source.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output = functional.scaled_dot_product_attention(*sources)
        gradients = torch.autograd.grad(output, sources, gradient)
    names = sorted({event.key for event in profile.key_averages() if "attention" in event.key})
    return {"operators": names, "finite": all(bool(each.isfinite().all()) for each in gradients)}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call."""
    if device.type == "cuda":
        return ceilings.seconds_of(call, repeats=5, warm_up=2)
    call()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def overlapping_copies(device: torch.device) -> Figures:
    """Measure the milliseconds of products alone, copies from pinned memory alone, and both at once."""
    is_cuda = device.type == "cuda"
    side, size = (8192, 1 << 29) if is_cuda else (64, 1 << 12)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device) if is_cuda else None

    def compute() -> None:
        for _ in range(8):
            left @ left

    def copy() -> None:
        target.copy_(host, non_blocking=True)

    def both() -> None:
        if stream is None:
            copy()
            compute()
            return
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy()
        compute()
        torch.cuda.current_stream(device).wait_stream(stream)

    alone, copied, together = (1000 * seconds_of(call, device) for call in (compute, copy, both))
    hidden = (alone + copied - together) / min(alone, copied)
    return {
        "products": round(alone, 2),
        "copies": round(copied, 2),
        "both": round(together, 2),
        "hidden": round(hidden, 2),
    }


def page_locked(device: torch.device) -> Figures:
    """Measure how fast host memory is page-locked in the pieces of block swap, and whether all of it is."""
    is_cuda = device.type == "cuda"
    size = (8 << 30) if is_cuda else (1 << 20)
    infos = {f"block {number}": TensorInfo(torch.uint8, (size // 8,)) for number in range(8)}
    begun = time.perf_counter()
    held = allocate(infos, pinned=is_cuda)
    seconds = time.perf_counter() - begun
    return {"GB": size / 1e9, "GB a second": round(size / 1e9 / seconds, 2), "unlocked": held.unpinned_bytes}


def product_peaks(device: torch.device) -> Figures:
    """Measure the TFLOP/s of square products in bf16, fp8 and int8, which bound the gain of small forms."""
    is_cuda = device.type == "cuda"
    side, count = (8192, 2 * 8192**3) if is_cuda else (64, 2 * 64**3)
    wide = [torch.randn(side, side, device=device) for _ in range(2)]
    bf16 = [each.bfloat16() for each in wide]
    int8 = [each.mul(40).clamp(-127, 127).to(torch.int8) for each in wide]
    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: bf16[0] @ bf16[1],
        "int8": lambda: torch._int_mm(int8[0], int8[1]),
    }
    if is_cuda:
        fp8 = [each.to(torch.float8_e4m3fn) for each in wide]
        one = torch.ones((), device=device)
        calls["fp8"] = lambda: torch._scaled_mm(
            fp8[0], fp8[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return {name: round(count / seconds_of(call, device) / 1e12, 3) for name, call in calls.items()}


PROBES = (
    Probe("cudnn_batches", 6, cudnn_batches),
    Probe("cudnn_one_by_one", 5, cudnn_one_by_one),
    Probe("cudnn_loop_cost", 3, cudnn_loop_cost),
    Probe("torch_own_choice", 2, torch_own_choice),
    Probe("overlapping_copies", 3, overlapping_copies),
    Probe("page_locked", 8, page_locked),
    Probe("product_peaks", 3, product_peaks),
)


# --- Measure one row of benchmarks/gpu.py, in the process that loads its model
# ------------------------------------------------------------------------------------------------------------

MIN_CALLS, MAX_CALLS = 2, 5  # timed calls
LONG = 10.0  # seconds of a call that is timed once
CONTEXT = 0.6  # GiB that CUDA takes of a card for itself
ENOUGH = 25.0  # seconds of timed calls, after which there is no other


def measure_row(
    row: Row,
    path: Path,
    high: Path | None,
    device: torch.device,
    enough: float = ENOUGH,
    profiled: bool = False,
) -> Figures:
    """Return the figures of a row.

    Args:
        row: The row.
        path: File of its model.
        high: File of the expert for high noise; None without one.
        device: The device.
        enough: Seconds to measure.
        profiled: Also profile a call.
    """
    if row.card:
        limit_memory(device, row.card)
    if row.kind == LOADING:
        return {**_measure_loading(row, path, device), "host": _host_peak()}
    bench = prepare_row(row, path, high, device)
    found = measure(bench, path, device, enough)
    return {**found, "profile": _profile(bench, device)} if profiled else found


def limit_memory(device: torch.device, card: float) -> None:
    """Let torch use no more of a CUDA device than a card of this many GiB has free."""
    if device.type == "cuda":
        full = torch.cuda.get_device_properties(device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction((card - CONTEXT) / full, device.index or 0)


def forget_row(device: torch.device) -> None:
    """Release what a row has left, so that the next one starts as in a new process."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device.index or 0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if is_known():
        start_of_peak()


def _profile(bench: Bench, device: torch.device) -> list[str]:
    """Return the lines of a profile of one call, or the reason why there is none; the row stays valid.

    Times are of a step, clip or text.
    """
    try:
        return report(profile_calls(bench.call, 1, device), max(round(bench.per), 1)).splitlines()
    except (RuntimeError, AssertionError) as error:
        return [f"failed: {error}"]


def prepare_row(row: Row, path: Path, high: Path | None, device: torch.device) -> Bench:
    """Load a row's model and prepare its timed work."""
    if row.kind == GENERATION:
        return generation(row, path, device, high)
    return {TRAINING: train_steps, LATENTS: latents, TEXTS: texts}[row.kind](row, path, device)


def measure(bench: Bench, path: Path, device: torch.device, enough: float) -> Figures:
    """Time a bench. The peak of the device's memory counts from the second call on."""
    (warm_up,) = time_call(bench.warm_up, device, 1, 1, 0)
    first = reset_peak(device)
    times = time_call(bench.call, device, MIN_CALLS, MAX_CALLS, enough)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "calls": len(times),
        "per": bench.per,
        "whole": bench.whole,
        "warm_up": warm_up,
        "operations": bench.operations,
        "model_operations": bench.model_operations,
        "device": reset_peak(device),
        "device_first": first,
        "reserved": reserved,
        "planned": bench.planned,
        "host": _host_peak(),
        "loading": bench.loading,
        "loaded": path.stat().st_size,
        "losses": [float(loss) for loss in bench.losses],
        "norms": [float(norm) for norm in bench.norms],
    }


def time_call(
    call: Callable[[], object], device: torch.device, minimum: int, maximum: int, enough: float
) -> list[float]:
    """Return the seconds of each call, each ended by the device's last kernel.

    There are at least `minimum` and at most `maximum` calls, and no other after `enough` seconds or after a
    long one.
    """
    times: list[float] = []
    synchronize(device)
    while len(times) < minimum or (len(times) < maximum and sum(times) < enough):
        if times and times[0] > LONG:
            break
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Return the peak of a CUDA device's memory, and reset it; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _host_peak() -> int:
    """Return the peak of host memory in bytes; 0 if the system does not report it."""
    return peak() if STATUS.exists() and "VmHWM" in STATUS.read_text(encoding="ascii") else 0


def _measure_loading(row: Row, path: Path, device: torch.device) -> Figures:
    """Time loading a transformer from a cached file, and from one that was dropped from the cache.

    The first loading, which also starts the device, is reported separately.
    """
    options, family = training_family(row, path)

    def load() -> None:
        host = make_host_weights(family.dit, options.speed.swap, device)
        placement = choose_placement(options, device, options.speed.fp8.quantization)
        dit = family.load_dit(replace(placement, host_weights=host))
        synchronize(device)
        del dit
        gc.collect()

    (warm_up,) = time_call(load, device, 1, 1, 0)
    reset_peak(device)
    times = time_call(load, device, MIN_CALLS, MIN_CALLS + 1, ENOUGH)
    found = {
        "seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "calls": len(times),
        "per": path.stat().st_size / 1e9,
        "warm_up": warm_up,
        "device": reset_peak(device),
        "loaded": path.stat().st_size,
        "forgotten": None,
    }
    if forget(path):
        (found["forgotten"],) = time_call(load, device, 1, 1, 0)
    return found
