"""What diffusers computes with LoRAs that the scripts train, against gen_img.py's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from tests.stable_diffusion import loaded
from tests.stable_diffusion.test_training_scripts import folder, train  # noqa: F401
from tests.tiny.stable_diffusion import write_folder

pytestmark = pytest.mark.slow
PLAIN = ["--network_args", "conv_dim=3", "conv_alpha=1.5"]
# the known format of a DoRA is left out: diffusers drops its magnitudes, with a warning
CASES = {
    "known": PLAIN,
    "diffusers": [*PLAIN, "--lora_format", "diffusers"],
    "diffusers, DoRA": [
        *("--network_args", "conv_dim=3", "dora_wd=True", "--lora_format", "diffusers"),
        *("--network_train_unet_only", "--cache_text_encoder_outputs"),
    ],
}


@torch.no_grad()
def results_of(pipeline: Any) -> list[Tensor]:
    """Return what the U-Net and each text encoder compute from the inputs of `loaded.results`."""
    width = pipeline.unet.config.cross_attention_dim
    encoders = [pipeline.text_encoder]
    added = None
    if width > 64:  # SDXL, whose text encoders are 64 wide each
        encoders.append(pipeline.text_encoder_2)
        added = {"text_embeds": loaded.random(1, 64, seed="pooled"), "time_ids": torch.full((1, 6), 64.0)}
    sample = loaded.random(1, 4, 4, 4, seed="sample", scale=1)
    context = loaded.random(1, 7, width, seed="context", scale=1)
    (output,) = pipeline.unet(sample, 500.0, context, added_cond_kwargs=added, return_dict=False)
    ids = torch.arange(6)[None]
    pooled = [encoder(ids).last_hidden_state[:, 5] for encoder in encoders]
    if len(encoders) == 2:
        pooled[1] = pipeline.text_encoder_2.text_projection(pooled[1])
    return [output, *pooled]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("case", CASES)
def test_diffusers_computes_the_same_with_a_trained_lora(folder: Path, case: str, kind: str) -> None:  # noqa: F811
    model = write_folder(kind, folder / "model")
    script = "sdxl_train_network.py" if kind == "sdxl" else "train_network.py"
    words = ["--output_name", "lora", "--network_dim", "2", "--cache_latents", *CASES[case]]
    train(folder, script, model, *words)
    ours = loaded.load(model, "--tokenizer_cache_dir", folder / "tokenizers")
    base = loaded.results(ours)
    loaded.put_in(ours, folder / "output" / "lora.safetensors")
    changed = loaded.results(ours)
    pipeline_class: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(model)

    pipeline.load_lora_weights(folder / "output", weight_name="lora.safetensors")

    theirs = results_of(pipeline)
    learned = base[:1] if "--network_train_unet_only" in words else base
    for index, before in enumerate(learned):
        assert not torch.allclose(changed[index], before, rtol=0, atol=1e-3 * float(before.std()))
    loaded.assert_same(tuple(theirs), changed)
