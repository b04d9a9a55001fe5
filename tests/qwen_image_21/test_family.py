"""What Qwen-Image-2.1 settles for a request, which files are Turbo, and what it refuses."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import qwen_image_21_generate_image
from generation.prompt_lines import parse_generation_line
from generation.request import prepare_line
from modules.errors import CheckpointError, OptionError
from modules.flow.solvers import solver_for
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from qwen_image_21.family import QwenImage21
from qwen_image_21.files import TURBO_LEVELS, QwenImage21Files, find_turbo, load_dit
from qwen_image_21.options import QwenImage21TrainingOptions, generation_options
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.manifests import tensor_list, write_hollow
from tests.tiny import qwen_image
from tests.tiny.families import family_called
from tests.tiny.project import write_image
from tests.tiny.qwen_image_21 import (
    config_json,
    tiny_state,
    write_dit,
    write_tiny_qwen_image_21,
    write_turbo,
)
from training.samples import warn_about_unused_keys

CPU = Placement(torch.device("cpu"))
FAMILY = family_called("qwen_image_21")
MAKE = (
    *FAMILY.generate,
    "--prompt",
    "x",
    "--save_path",
    "o",
    "--image_size",
    "64",
    "32",
    "--infer_steps",
    "1",
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> QwenImage21:
    files = write_tiny_qwen_image_21(tmp_path_factory.mktemp("models"))
    return QwenImage21(QwenImage21Files(files.dit, vae=files.vae, text_encoder=files.text_encoder))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    FAMILY.prepare(tmp_path)
    write_image(tmp_path / "start.png", 64, 48)
    return tmp_path


def with_dit(family: QwenImage21, dit: Path) -> QwenImage21:
    return replace(family, files=replace(family.files, dit=dit))


def prepare(family: QwenImage21, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


def sigmas_of(prepared: Prepared) -> torch.Tensor:
    solver = solver_for(prepared.solver, prepared.steps, prepared.flow_shift, levels=prepared.sigmas)
    return solver.schedule.sigmas


def test_noise_levels_follow_the_size_and_end_at_a_fiftieth(family: QwenImage21) -> None:
    """mu is 0.5 at 256 tokens and 0.9 at 8192, of 16 x 16 pixels each."""
    default = prepare(family)
    assert (default.width, default.height, default.steps, default.guidance_scale) == (1024, 1024, 40, (1.0,))
    for width, height in ((256, 256), (1024, 1024), (2048, 1024)):
        mu = 0.5 + 0.4 * (width * height / 256 - 256) / (8192 - 256)
        even = torch.linspace(1, 0.25, 4, dtype=torch.float64)
        shifted = math.exp(mu) / (math.exp(mu) + 1 / even - 1)
        expected = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
        found = sigmas_of(prepare(family, width=width, height=height, steps=4))
        torch.testing.assert_close(found[:-1].double(), expected, rtol=1e-6, atol=1e-6)


def test_turbo_keeps_its_own_levels_unless_it_gets_other_steps(
    family: QwenImage21, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = [1.0, 0.8, 0.3]
    turbo = with_dit(family, write_turbo(tmp_path, levels))
    made = prepare(turbo, width=256, height=256)
    shift = math.exp(0.5)
    shifted = [shift / (shift + 1 / level - 1) for level in levels]
    expected = [1 - (1 - level) * 0.98 / (1 - shifted[-1]) for level in shifted]
    assert (made.steps, made.guidance_scale) == (3, (1.0,))
    assert sigmas_of(made).tolist() == pytest.approx([*expected, 0.0], rel=1e-6)
    assert not caplog.text
    assert prepare(turbo, steps=5).sigmas == ()
    assert "distilled for its own 3 noise levels: with 5 steps" in caplog.text


@pytest.mark.parametrize(
    ("path", "is_turbo"),
    [
        ("qwen_image_2.1_turbo_bf16.safetensors", True),
        ("Qwen-Image-2.1-Turbo/transformer", True),
        ("qwen_image_2.1_8steps.safetensors", True),
        ("qwen_image_2.1_bf16.safetensors", False),
        ("qwen_image_2.1_de-turbo.safetensors", False),
        ("turbo/qwen_image_2.1.safetensors", False),
    ],
)
def test_a_name_says_which_one_it_is(family: QwenImage21, path: str, is_turbo: bool) -> None:
    named = with_dit(family, Path(path))
    assert (find_turbo(Path(path)) is not None) == is_turbo
    assert named.defaults.steps == (len(TURBO_LEVELS) if is_turbo else 40)
    assert (named.few_steps_evidence() is not None) == is_turbo


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"sample_sigmas": 8}',
        '{"sample_sigmas": []}',
        '{"sample_sigmas": [0.5, 0.9]}',
        '{"sample_sigmas": [1.0, -1]}',
        '{"sample_sigmas": [1.0, "0.5"]}',
        '{"sample_sigmas": [NaN]}',
        json.dumps({"sample_sigmas": [1 - number / 5000 for number in range(2000)]}),
        "[" * 100_000,
    ],
)
def test_a_hostile_index_is_one_error(family: QwenImage21, tmp_path: Path, content: str) -> None:
    turbo = with_dit(family, write_turbo(tmp_path, [1.0]))
    (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="model_index.json"):
        _ = turbo.defaults


def change(**settings: Any) -> str:
    return json.dumps(config_json(**settings))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "not the configuration"),
        (json.dumps({"_class_name": "FluxTransformer2DModel"}), "not the configuration"),
        (change(patch_size=2), "patch_size is 2"),
        (change(causal_condition=False), "causal_condition is False"),
        (change(num_layers=3), "num_layers is 3"),
        (change(num_attention_heads=4), "num_attention_heads is 4"),
        (change(axes_dims_rope=[2, 3, 27]), "three even numbers"),
        (change(axes_dims_rope=[2, 2, 2]), "three even numbers"),
        (change(axes_dims_rope="16"), "three even numbers"),
        (change(axes_dims_rope=[1e9, -1e9, 32]), "three even numbers"),
        (change(eps=-1.0), "eps is -1"),
        (change(eps="x"), "eps is x"),
    ],
)
def test_a_hostile_configuration_is_one_error(tmp_path: Path, content: str, words: str) -> None:
    config = tmp_path / "other.json"
    config.write_text(content, encoding="utf-8")
    files = QwenImage21Files(write_dit(tmp_path, tiny_state())).add_config(config)
    with pytest.raises(CheckpointError, match=words):
        files.dit_header()
    with pytest.raises(OptionError, match="no such file"):
        files.add_config(tmp_path / "none.json")


def test_a_configuration_says_what_tensors_do_not(tmp_path: Path) -> None:
    """From the folder, or from --dit_config for a single file."""
    axes = (8, 12, 12)
    folder = write_turbo(tmp_path, None)
    (folder / "config.json").write_text(change(axes_dims_rope=axes, eps=1e-5), encoding="utf-8")
    alone = QwenImage21Files(write_dit(tmp_path / "alone", tiny_state())).add_config(folder / "config.json")
    for files in (QwenImage21Files(folder), alone):
        config = files.dit_header().config
        assert (config.axes, config.eps) == (axes, 1e-5)
        network = files.format.load(files.dit_path, CPU)
        assert network.config == config


def test_the_release_has_32_blocks(tmp_path: Path) -> None:
    tensors = tensor_list("qwen-image-2.1-dit")
    cut = {name: each for name, each in tensors.items() if ".31." not in name}
    with pytest.raises(CheckpointError, match="31 of 32 blocks are present"):
        QwenImage21Files(write_hollow(tmp_path / "cut.safetensors", cut)).dit_header()


def test_a_control_net_is_refused_by_name(tmp_path: Path) -> None:
    path = write_dit(tmp_path, {**tiny_state(), "control_img_in.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="contains a ControlNet"):
        load_dit(path, CPU)


def options_of(*words: str) -> Any:
    found: list[Any] = []
    files = ["--dit", "q.safetensors", "--save_path", "out"]
    qwen_image_21_generate_image.main([*files, *words], lambda family, options: found.append(options))
    return found[0]


def test_an_empty_negative_prompt_is_one_and_guidance_needs_one(family: QwenImage21) -> None:
    assert options_of("--prompt", "x").request.negative_prompt is None
    for words in (("--negative_prompt", ""), ("--negative_prompt", '""')):
        assert options_of("--prompt", "x", *words).request.negative_prompt == " "
    line_options = options_of("--prompt", "x").line_options
    for text in ('--n ""', "--n "):
        assert parse_generation_line(f"a dog {text}", line_options)["negative_prompt"] == " "
    assert parse_generation_line("a dog --m mask.png", line_options)["mask_path"] == "mask.png"
    with pytest.raises(OptionError, match="--guidance_scale 4 .* need a --negative_prompt"):
        prepare(family, guidance_scale=4.0)
    assert prepare(family, guidance_scale=4.0, negative_prompt=" ").guidance_scale == (4.0,)


def test_an_edit_without_a_size_has_the_shape_of_its_last_picture(
    family: QwenImage21, tmp_path: Path
) -> None:
    """About a megapixel; without a picture 1024 x 1024; a size that is typed counts."""
    write_image(tmp_path / "first.png", 64, 64)
    write_image(tmp_path / "last.png", 120, 60)
    images = ["--control_image_path", str(tmp_path / "first.png"), str(tmp_path / "last.png")]
    for words, size in (
        ([], (1024, 1024)),
        (images, (1440, 736)),
        ([*images, "--image_size", "64", "96"], (96, 64)),
    ):
        made = prepare_line(family, options_of("--prompt", "x", *words), {})
        assert (made.width, made.height) == size
        assert made.prompts[0].negative is not None
        assert len(made.prompts[0].negative.images) == len(made.prompts[0].positive.images)


def test_the_mask_of_a_sample_is_in_the_printed_command(
    family: QwenImage21, caplog: pytest.LogCaptureFixture
) -> None:
    line = {"mask_path": "mask.png"}

    words = generation_options(QwenImage21TrainingOptions.from_defaults(), {"extra": line})
    warn_about_unused_keys([line], family, Path("prompts.txt"))

    assert words["--mask_path"] == "mask.png"
    assert not caplog.messages


def test_other_spellings_of_the_dtype_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="--dtype"):
        options_of("--prompt", "x", "--dtype", "float32", "--dit_dtype", "bfloat16")


def reject(folder: Path, script: str, *words: object, told: Sequence[object]) -> None:
    assert_one_message(*run_here(script, *words, folder=folder), *told)


def narrow_encoder(folder: Path) -> None:
    """States of other width than the transformer takes."""
    path = folder / "model" / "dit.safetensors"
    state = load_file(path)
    state["txt_in.in_layer.weight"] = state["txt_in.in_layer.weight"][:, :48]
    state["txt_in.text_norm.weight"] = state["txt_in.text_norm.weight"][:48]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def put_qwen_image(folder: Path) -> None:
    save_file(qwen_image.tiny_state(), folder / "model" / "dit.safetensors")


def put_wan_vae(folder: Path) -> None:
    from tests.tiny.wan_encoders import vae_tensors

    save_file(vae_tensors(), folder / "model" / "vae.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words", "told"),
    [
        (put_qwen_image, (), ("dit.safetensors", "looks like a Qwen-Image transformer", "--dit")),
        (put_wan_vae, (), ("vae.safetensors", "Qwen-Image-2.1")),
        (narrow_encoder, (), ("--text_encoder", "48", "64")),
        (None, ("--control_image_path", "none.png"), ("none.png", "no such file")),
        (None, ("--control_image_path", *["start.png"] * 11), ("11 reference images", "takes 10 at most")),
        (None, ("--mask_path", "start.png"), ("--mask_path", "no image to keep")),
        (
            None,
            ("--control_image_path", "start.png", "--mask_path", "start.png"),
            ("--mask_path", "1184 x 896", "--resize_control_to_image_size"),
        ),
        (
            None,
            ("--resize_control_to_image_size", "--resize_control_to_official_size"),
            ("--resize_control_to_official_size", "--resize_control_to_image_size"),
        ),
        (None, ("--dit_config", "none.json"), ("--dit_config none.json", "no such file")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_used_is_one_message(
    project: Path, spoil: Callable[[Path], None] | None, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    if spoil is not None:
        spoil(project)
    reject(project, *MAKE, *words, told=told)


def test_a_file_of_it_is_refused_by_the_scripts_of_qwen_image(tmp_path: Path) -> None:
    other = family_called("qwen_image")
    other.prepare(tmp_path)
    save_file(tiny_state(), tmp_path / "model" / "dit.safetensors")
    words = ("--prompt", "x", "--save_path", "o")
    reject(
        tmp_path, *other.generate, *words, told=["looks like a Qwen-Image-2.1 transformer", "qwen_image_21_"]
    )


def test_a_mask_holds_what_is_black_to_the_first_picture(project: Path) -> None:
    """The black half of the result is the reference; the other half is not."""
    write_image(project / "start.png", 32, 64)
    mask = Image.new("L", (32, 64))
    mask.paste(255, (0, 0, 32, 32))
    mask.save(project / "mask.png")
    words = ("--control_image_path", "start.png", "--resize_control_to_image_size", "--output_type", "latent")
    found = []
    for more in ((), ("--mask_path", "mask.png")):
        folder = f"made {len(more)}"
        succeed_here(*MAKE, *words, *more, "--save_path", folder, folder=project)
        (path,) = (project / folder).glob("*.safetensors")
        found.append(load_file(path)["latent"])
    free, held = found
    assert not torch.allclose(free[..., 2:, :], held[..., 2:, :], atol=1e-2)
    source = QwenImage21Files(vae=project / "model" / "vae.safetensors", vae_dtype=torch.float32)
    pixels = numpy.array(Image.open(project / "start.png").convert("RGBA"))
    image = torch.from_numpy(pixels)
    expected = source.load_vae(torch.device("cpu")).encode(image[None, None].movedim(-1, 1))
    torch.testing.assert_close(held[..., 2:, :], expected[0][..., 2:, :], rtol=1e-4, atol=1e-4)


def test_sizes_are_multiples_of_32(family: QwenImage21, caplog: pytest.LogCaptureFixture) -> None:
    made = prepare(family, width=100, height=70)
    assert (made.width, made.height) == (96, 64)
    assert re.search("100 x 70 is changed to 96 x 64", caplog.text)
