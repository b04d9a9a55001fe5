"""The timed work of the caching rows of benchmarks/gpu.py: VAEs on random clips, text encoders on tokens.

Decoding videos, tokenizers and files are left out: they work on the CPU, ahead of the device.
"""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_families import FAMILIES
from benchmarks.gpu_rows import Row
from benchmarks.gpu_steps import SEED, Bench
from benchmarks.noise import fill_with_noise
from dataset.options import read_latent_caching
from protocols.data import MediaBatch, MediaTable
from runtime.planning.dry_run import modules_in

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
