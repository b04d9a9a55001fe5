"""Wan VACE through the command line equals diffusers' WanVACEPipeline, in float32 latents and in pictures.

1e-5 of the largest value: both compute the same sums in float32, and the nearest mistakes that are tried
below are a hundred times as far away.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.media.reading import read_image
from modules.media.writing import write_png
from tests.faults.messages import succeed_here
from tests.parity.reference import ReleasedUniPC, draw_noise, relative_error
from tests.parity.running import assert_equal, generate, models_in
from tests.parity.theirs import Theirs
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_dit import diffusers_state

PROMPT, NEGATIVE, SEED = "a red apple rolls &amp; stops", "dull, blurry", 31
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 3
ASK: list[object] = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", SEED, "--flow_shift", 3]
ASK += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS]
EXACT = 1e-5
Options = list[object]


def their_dit(path: Path) -> WanVACETransformer3DModel:
    """diffusers' network of the same weights."""
    state = diffusers_state(load_file(path))
    width, frequencies = state["condition_embedder.time_embedder.linear_1.weight"].shape
    made = WanVACETransformer3DModel(
        num_attention_heads=width // 128,
        attention_head_dim=128,
        text_dim=state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
        freq_dim=frequencies,
        ffn_dim=len(state["blocks.0.ffn.net.0.proj.weight"]),
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=96,
    )
    made.load_state_dict(state)
    return made.eval()


class Scene:
    """Tiny models, and the pictures and frames that they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, folder / "models"
        write_tiny_wan(self.models, "vace", experts=2)
        random = numpy.random.default_rng(7)
        self.frames = [random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8) for _ in range(FRAMES)]
        self.masks = [self.mask_of(index) for index in range(FRAMES)]
        self.references = [
            random.integers(0, 256, (rows, columns, 3), dtype=numpy.uint8)
            for rows, columns in ((40, 37), (21, 90))
        ]
        for name, images in (
            ("video", self.frames),
            ("mask", self.masks),
            ("references", self.references),
        ):
            (folder / name).mkdir()
            for index, image in enumerate(images):
                write_png(folder / name / f"{index:02d}.png", image)

    @staticmethod
    def mask_of(index: int) -> numpy.ndarray:
        """White on the right, and from frame 5 on below too, with levels on either side of the threshold."""
        mask = numpy.full((HEIGHT, WIDTH, 3), 127, numpy.uint8)
        mask[:, WIDTH // 2 :] = 128
        mask[HEIGHT // 2 :] = 255 if index >= 5 else 0
        return mask

    @property
    def video(self) -> Options:
        return ["--src_video", self.folder / "video"]

    @property
    def mask(self) -> Options:
        return ["--src_mask", self.folder / "mask"]

    @property
    def pictures(self) -> Options:
        return ["--src_ref_images", *sorted((self.folder / "references").iterdir())]

    def theirs(
        self, boundary: float | None = None, lora: Mapping[str, Tensor] | None = None, **asked: Any
    ) -> Tensor:
        """Latents of diffusers' pipeline; pictures if output_type says so."""
        parts, low = Theirs(self.models), their_dit(self.models / "dit.safetensors")
        experts = {"transformer": low}
        if boundary is not None:
            high = their_dit(self.models / "dit_high.safetensors")
            experts = {"transformer": high, "transformer_2": low}
        for name in (name for name in lora or {} if name.endswith("lora_up.weight")):
            add_lora(low, name, lora or {})
        pipeline = WanVACEPipeline(
            tokenizer=parts.tokenizer,
            text_encoder=parts.t5,
            vae=parts.vae,
            scheduler=ReleasedUniPC(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            boundary_ratio=boundary,
            **experts,
        )
        pipeline.set_progress_bar_config(disable=True)
        front = len(asked.get("reference_images", ()))
        noise = draw_noise(SEED, FRAMES + 4 * front, HEIGHT, WIDTH)
        made = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            **{"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": STEPS},
            guidance_scale=5.0,
            latents=noise[None],
            **{"output_type": "latent", **asked},
        )
        found: Tensor = made.frames[0]
        return found if "output_type" in asked else found[:, front:]  # it cuts only what it decodes

    def images(self, arrays: list[numpy.ndarray]) -> list[Image.Image]:
        return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("vace"))


def test_a_video_with_a_mask(tmp_path: Path, scene: Scene) -> None:
    latents = generate(tmp_path, scene.models, "vace-1.3B", *ASK, *scene.video, *scene.mask)

    video, mask = scene.images(scene.frames), scene.images(scene.masks)
    expected = scene.theirs(video=video, mask=mask)
    assert_equal(latents, expected, "video and mask", EXACT)
    turned = scene.images([255 - array for array in scene.masks])
    assert relative_error(scene.theirs(video=video, mask=turned), expected) > 100 * EXACT


@pytest.mark.slow
def test_a_video_is_followed_without_a_mask(tmp_path: Path, scene: Scene) -> None:
    given = ["--control_path", scene.folder / "video"]

    latents = generate(tmp_path, scene.models, "vace-14B", *ASK, *given)

    assert_equal(latents, scene.theirs(video=scene.images(scene.frames)), "control alone", EXACT)


@pytest.mark.slow
def test_two_references_at_half_the_strength(tmp_path: Path, scene: Scene) -> None:
    half = ["--vace_scale", 0.5]

    latents = generate(tmp_path, scene.models, "vace-1.3B", *ASK, *scene.pictures, *half)

    references = scene.images(scene.references)
    expected = scene.theirs(reference_images=references, conditioning_scale=0.5)
    assert_equal(latents, expected, "two references, half the strength", EXACT)
    other = scene.theirs(reference_images=references[::-1], conditioning_scale=0.5)
    assert relative_error(other, expected) > 100 * EXACT, "their order is seen"


def test_all_together_with_a_strength_for_each_layer(tmp_path: Path, scene: Scene) -> None:
    given = [*scene.video, *scene.mask, *scene.pictures, "--vace_scale", 1.25, 0.3]

    latents = generate(tmp_path, scene.models, "vace-1.3B", *ASK, *given)

    expected = scene.theirs(
        video=scene.images(scene.frames),
        mask=scene.images(scene.masks),
        reference_images=scene.images(scene.references),
        conditioning_scale=[1.25, 0.3],
    )
    assert_equal(latents, expected, "all", EXACT)


@pytest.mark.slow
def test_two_experts_have_a_second_stack_each(tmp_path: Path, scene: Scene) -> None:
    given = ["--dit_high_noise", scene.models / "dit_high.safetensors", *scene.video, *scene.mask]

    latents = generate(tmp_path, scene.models, "vace-A14B", *ASK, *given)

    video, mask = scene.images(scene.frames), scene.images(scene.masks)
    assert_equal(latents, scene.theirs(0.875, video=video, mask=mask), "two experts", EXACT)


def test_the_pictures_are_those_of_the_pipeline(tmp_path: Path, scene: Scene) -> None:
    """Within 1 of 255; nothing beyond the reference is in the video."""
    given = [*scene.video, *scene.mask, *scene.pictures]
    options = [*models_in(scene.models), "--task", "vace-1.3B", "--save_path", "made", *ASK, *given]

    succeed_here("wan_generate_video.py", *options, "--output_type", "images", folder=tmp_path)

    expected = scene.theirs(
        video=scene.images(scene.frames),
        mask=scene.images(scene.masks),
        reference_images=scene.images(scene.references),
        output_type="np",
    )
    made = sorted((tmp_path / "made").rglob("*.png"))
    assert len(made) == len(expected) == FRAMES
    for path, frame in zip(made, expected, strict=True):
        difference = read_image(path).astype(float) - 255 * numpy.asarray(frame)
        assert abs(difference).max() <= 1


def test_the_second_stack_in_a_file_of_its_own(tmp_path: Path, scene: Scene) -> None:
    """Beside a transformer of text to video in diffusers' names."""
    state = load_file(scene.models / "dit.safetensors")
    shutil.copytree(scene.models, tmp_path / "apart")
    own = {name: tensor for name, tensor in state.items() if name.startswith("vace_")}
    base = {name: tensor for name, tensor in state.items() if name not in own}
    save_file(own, tmp_path / "module.safetensors")
    save_file(diffusers_state(base), tmp_path / "apart" / "dit.safetensors")
    given = [*scene.video, *scene.mask]

    full = generate(tmp_path / "a", scene.models, "vace-1.3B", *ASK, *given)
    apart = generate(
        *(tmp_path / "b", tmp_path / "apart", "vace-1.3B", *ASK, *given),
        *("--vace", tmp_path / "module.safetensors"),
    )

    assert torch.equal(full, apart)


def test_without_control_it_is_text_to_video_to_the_bit(tmp_path: Path, scene: Scene) -> None:
    """At a strength of 0, with a LoRA of text to video, and with the second stack in the file or not."""
    state = load_file(scene.models / "dit.safetensors")
    alone = {name: tensor for name, tensor in state.items() if not name.startswith("vace_")}
    shutil.copytree(scene.models, tmp_path / "t2v")
    save_file(alone, tmp_path / "t2v" / "dit.safetensors")
    save_file(lora_state(["blocks.0.self_attn.q", "blocks.3.ffn.0"], alone), tmp_path / "lora.safetensors")
    lora = ["--lora_weight", tmp_path / "lora.safetensors"]

    plain = generate(tmp_path / "a", tmp_path / "t2v", "t2v-1.3B", *ASK, *lora, "--guidance_scale", 5)
    given = [*scene.video, *scene.mask, "--vace_scale", 0]
    weak = generate(tmp_path / "b", scene.models, "vace-1.3B", *ASK, *lora, *given)

    assert torch.equal(plain, weak)


def test_a_lora_of_text_to_video_acts_beside_the_hints(tmp_path: Path, scene: Scene) -> None:
    """Nothing is given: the control is gray, all of it to be made new."""
    lora = lora_state(["blocks.0.self_attn.q", "blocks.3.ffn.0"], load_file(scene.models / "dit.safetensors"))
    save_file(lora, tmp_path / "lora.safetensors")

    latents = generate(
        tmp_path, scene.models, "vace-1.3B", *ASK, "--lora_weight", tmp_path / "lora.safetensors"
    )

    assert_equal(latents, scene.theirs(lora=lora), "nothing, with a LoRA", EXACT)
    assert relative_error(scene.theirs(), latents) > 100 * EXACT


@torch.no_grad()
def add_lora(dit: WanVACETransformer3DModel, name: str, lora: Mapping[str, Tensor]) -> None:
    """Add one product of a LoRA, its alpha equal to its rank, to diffusers' weight."""
    path = {"lora_unet_blocks_0_self_attn_q": "blocks.0.attn1.to_q", "lora_unet_blocks_3_ffn_0": _FFN}
    start = name.removesuffix(".lora_up.weight")
    dit.get_submodule(path[start]).weight += lora[name] @ lora[f"{start}.lora_down.weight"]


_FFN = "blocks.3.ffn.net.0.proj"


def lora_state(paths: list[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of rank 2 in our names."""
    generator, made = torch.Generator().manual_seed(5), {}
    for path in paths:
        rows, columns = state[f"{path}.weight"].shape
        name = f"lora_unet_{path.replace('.', '_')}"
        made[f"{name}.lora_down.weight"] = torch.randn(2, columns, generator=generator) / 10
        made[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) / 10
        made[f"{name}.alpha"] = torch.tensor(2.0)
    return made
