"""minimax_h3_generate_video.py against diffusers' modular pipeline, from files on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines import MiniMaxH3Blocks
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.faults.messages import succeed_here
from tests.minimax_h3 import test_video_vae
from tests.parity.running import assert_equal
from tests.tiny.minimax_h3 import TinyH3, text_encoder, their_audio_vae, their_h3_dit, write_tiny_h3

SCRIPT = "minimax_h3_generate_video.py"
PROMPT = "a cat purrs.\nThen <d>[English] hello</d>"
STEPS = 3


class Processor:
    """What diffusers asks of Qwen3-VL's processor for a text; the real one needs torchvision."""

    def create_mm_token_type_ids(self, rows: list[list[int]]) -> list[list[int]]:
        return [[0] * len(row) for row in rows]


def pipeline(files: TinyH3) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.tokenizer / "tokenizer.json"), pad_token="<|endoftext|>"
    )
    pipe = MiniMaxH3Blocks().init_pipeline()
    pipe.update_components(
        transformer=their_h3_dit(),
        vae=test_video_vae.their_vae(),
        audio_vae=their_audio_vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        processor=Processor(),
        scheduler=MiniMaxH3Scheduler(12.0),
        audio_scheduler=MiniMaxH3Scheduler(3.0),
    )
    return pipe


def latents_in(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)


def test_latents_are_those_of_diffusers(tmp_path: Path) -> None:
    files = write_tiny_h3(tmp_path / "model")
    state = pipeline(files)(
        prompt=PROMPT,
        height=32,
        width=64,
        num_frames=124,
        num_inference_steps=STEPS + 1,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    )

    words = ["--prompt", PROMPT, "--video_size", "32", "64", "--infer_steps", STEPS, "--seed", 7]
    words += ["--dit_dtype", "float32", "--output_type", "both", "--save_path", "made", "--device", "cpu"]
    said = succeed_here(SCRIPT, *files.words, *words, folder=tmp_path)

    made = latents_in(tmp_path / "made")
    print(state.values.keys())
    assert_equal(made["latent"], state.values["latents"][0], "pictures")
