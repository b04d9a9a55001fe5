"""FLUX.1 and Chroma as a family: whole runs against recorded ones, schedules, requests, files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_minimal_inference
from flux.family import Flux, family_for_text_caching, family_for_training
from flux.files import FluxFiles
from flux.model import pack
from flux.official_options import generation_argv, read_minimal
from flux.options import FluxTextCachingOptions, FluxTextOptions, FluxTrainingOptions
from flux.spec import count_tokens, size_shift
from generation.denoise import make_latents
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from modules.flow.schedule import make_schedule
from protocols.data import Batch, CacheOrigin, MediaTable
from protocols.loading import Placement
from protocols.requests import Request
from protocols.steps import EncodedPrompts
from tests.commands import joined
from tests.flux.making import tiny_control_net, tiny_inputs, tiny_model
from tests.golden_cases import DRAWN, read_case, write_model
from tests.tiny.flux import CLIP_DIM, T5_DIM, tiny_state, write_dit, write_tiny_flux

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("case", "recorded", "model", "steps", "masks", "scale"),
    [
        ("flux_sampling", "latent_dev", "flux_dit_guidance", "steps", False, 1.0),
        ("flux_sampling", "latent_dev_mask", "flux_dit_guidance", "steps", True, 1.0),
        ("flux_sampling", "latent_dev_cfg", "flux_dit_guidance", "steps", False, 4.0),
        ("flux_sampling", "latent_schnell", "flux_dit_noguidance", "steps_schnell", False, 1.0),
        ("chroma_sampling", "latent", "chroma_dit", "steps", True, 1.0),
        ("chroma_sampling", "latent_cfg", "chroma_dit", "steps", True, 4.0),
    ],
)
def test_a_whole_run_equals_the_recorded_one(
    tmp_path: Path, case: str, recorded: str, model: str, steps: str, masks: bool, scale: float
) -> None:
    description, tensors = read_case(case)
    family = Flux(FluxFiles(write_model(model, tmp_path), masks_text=masks))
    size = (*description["width_height"], 1)
    asked = (description["seed"], *size, description[steps], scale, description["guidance"])
    prepared = family.prepare(Request("p", *asked))

    def text(ending: str) -> dict[str, Tensor | list[Tensor]]:
        names = {"t5_out": "t5", "t5_attn_mask": "t5_mask", "l_pooled": "pooled"}
        return {name: tensors[key + ending][0] for name, key in names.items() if key + ending in tensors}

    dit = family.load_dit(Placement(CPU))
    starts: list[Tensor] = []

    def watch(done: object) -> bool:
        starts.append(done.step.noisy)  # type: ignore[attr-defined]
        return False

    encoded = {0: EncodedPrompts(text(""), text("_negative"))}
    latents = make_latents(
        family, lambda _: dit, prepared, encoded, {0: {}}, CPU, watchers=[watch], split=scale == 1
    )

    torch.testing.assert_close(pack(starts[0]), tensors["noise"], atol=DRAWN, rtol=0)
    torch.testing.assert_close(pack(latents), tensors[recorded], atol=1e-3, rtol=1e-3)


def test_schedules_are_the_recorded_ones() -> None:
    cases, _ = read_case("image_schedules")
    found = [case for case in cases["cases"] if "flux" in case["family"]]
    assert len(found) > 4
    for case in found:
        width, height = case["width_height"]
        tokens = count_tokens(height, width)
        shift = 1.0 if case["model"] == "schnell" else size_shift(tokens)

        sigmas = make_schedule("euler", case["steps"], shift).sigmas

        assert tokens == case["image_tokens"]
        torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "steps", "embedded", "scale"),
    [("dev", 50, 3.5, 1.0), ("schnell", 4, None, 1.0), ("chroma", 50, 0.0, 4.0)],
)
def test_defaults_are_those_of_the_file(
    tmp_path: Path, kind: str, steps: int, embedded: float | None, scale: float
) -> None:
    family = Flux(FluxFiles(write_dit(tmp_path, tiny_state(kind))))

    prepared = family.prepare(Request("a cat", 1, 256, 512))

    assert (prepared.steps, prepared.embedded_guidance, prepared.frames) == (steps, embedded, 1)
    assert prepared.guidance_scale == (scale,)
    assert prepared.flow_shift == (1.0 if kind == "schnell" else size_shift(512))
    assert family.metadata["architecture"] == {"dev": "flux-1-dev", "schnell": "flux-1-schnell"}.get(
        kind, kind
    )


@pytest.mark.parametrize("kind", ["schnell", "chroma"])
def test_an_embedded_guidance_that_the_model_has_no_use_for_is_told(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    family = Flux(FluxFiles(write_dit(tmp_path, tiny_state(kind))))

    prepared = family.prepare(Request("a cat", 1, 64, 64, embedded_guidance=7.0))

    assert "embedded guidance 7" in caplog.text
    assert prepared.embedded_guidance == family.defaults.embedded_guidance


def test_model_type_chroma_is_checked_against_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = FluxFiles(write_dit(tmp_path, tiny_state("dev")), says_chroma=True)

    with pytest.raises(OptionError, match="--model_type chroma: .* is a FLUX.1 dev transformer"):
        _ = Flux(files).dit_files
    chroma = write_dit(tmp_path, tiny_state("chroma"))
    assert Flux(FluxFiles(chroma, says_chroma=True)).dit_files
    assert not caplog.messages
    assert FluxFiles(chroma).kind == "chroma"
    assert f"{chroma} is Chroma: it is used as --model_type chroma" in caplog.text


def test_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    models = write_tiny_flux(tmp_path)
    other = write_dit(tmp_path / "other", tiny_state("dev"))
    files = FluxFiles(models.dit, clip_l=models.clip_l, t5xxl=models.t5xxl)

    with pytest.raises(CheckpointError, match="--clip_l .* produces hidden states of"):
        Flux(replace(files, dit=other)).check_files(media=False)
    Flux(files).check_files(media=False)
    with pytest.raises(OptionError, match="--ae"):
        Flux(files).check_files(media=True)


def test_a_missing_transformer_is_called_by_the_option_that_was_typed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^--dit \(--pretrained_model_name_or_path\)"):
        _ = Flux(FluxFiles(tmp_path / "none.safetensors")).dit_files


def test_captions_for_chroma_need_no_clip() -> None:
    text = FluxTextOptions(t5xxl=Path("t5"))
    with pytest.raises(OptionError, match="--model_type chroma"):
        FluxTextCachingOptions(text=text)

    family = family_for_text_caching(FluxTextCachingOptions(text=text, model_type="chroma"))

    assert family.text_keys == {"t5_out", "t5_attn_mask"}
    assert family.latent.npz is not None
    assert family.latent.npz.constants == {"apply_t5_attn_mask": True}


@pytest.mark.parametrize(("kind", "guidance"), [("dev", 2.5), ("chroma", 0.0)])
def test_training_feeds_the_texts_and_the_guidance(tmp_path: Path, kind: str, guidance: float) -> None:
    path = write_dit(tmp_path, tiny_state(kind))
    family = family_for_training(FluxTrainingOptions(dit=path, embedded_guidance=2.5))
    inputs = tiny_inputs(kind)
    names = {"t5_out": "t5", "t5_attn_mask": "t5_mask", "l_pooled": "pooled"}
    tensors = {name: inputs[key] for name, key in names.items() if inputs[key] is not None}
    latents = inputs["noisy"]

    cond = family.batch_conditions(latents, Batch(tensors, ("a", "b"), ("a", "b")))
    velocity = family.predict(tiny_model(kind), latents, inputs["timesteps"], cond)

    expected = inputs | {"guidance": torch.full((2,), guidance)}
    expected |= {} if kind == "chroma" else {"t5_mask": None}  # without --apply_t5_attn_mask
    torch.testing.assert_close(velocity, tiny_model(kind)(**expected), rtol=1e-5, atol=1e-5)


def test_caches_of_texts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    latents = torch.zeros(1, 16, 1, 4, 4)
    states, mask = torch.zeros(1, 257, 48), torch.ones(1, 257)
    texts = {"t5_attn_mask": mask, "l_pooled": torch.zeros(1, 24), "t5_out": states}
    made = CacheOrigin(Path("a.npz"), "t5", {"t5_mask": "not used"})
    batch = Batch(texts, ("a",), ("a",), (made,))
    dev = Flux(FluxFiles(write_dit(tmp_path / "dev", tiny_state())))
    schnell = Flux(FluxFiles(write_dit(tmp_path / "schnell", tiny_state("schnell"))))

    dev.batch_conditions(latents, batch)
    with pytest.raises(CacheError, match="l_pooled"):
        dev.batch_conditions(latents, replace(batch, tensors={"t5_out": states, "t5_attn_mask": mask}))
    with pytest.raises(CacheError, match="padding mask was not used .* for --apply_t5_attn_mask"):
        replace(dev, files=replace(dev.files, masks_text=True)).batch_conditions(latents, batch)
    for name, wrong, says in (
        ("t5_attn_mask", torch.ones(1, 9), "and t5_out in its cache differ in length"),
        ("l_pooled", torch.zeros(1, 24, dtype=torch.int64), "has integers"),
        ("l_pooled", torch.zeros(1, 7), "l_pooled in its cache has width 7"),
    ):
        with pytest.raises(CacheError, match=says):
            dev.batch_conditions(latents, Batch({**texts, name: wrong}, ("a",), ("a",)))
    with pytest.raises(CacheError, match="257 tokens of T5, this transformer was trained with 256"):
        schnell.batch_conditions(latents, batch)


def words_of(*argv: str) -> list[str]:
    return generation_argv(read_minimal("", ["--ckpt_path", "flux1-dev.safetensors", *argv]))


def test_the_guides_defaults_are_put_into_our_words() -> None:
    words = words_of()

    assert {"--prompt=A photo of a cat", "--guidance_scale=1.0", "--embedded_cfg_scale=3.5"} <= joined(words)
    assert {f"--{part}_dtype=bfloat16" for part in ("dit", "text_encoder", "vae")} <= joined(words)
    assert not [word for word in words if word.startswith(("--seed", "--infer_steps"))]  # those of the model


def test_the_guides_sizes_dtypes_and_loras_are_put_into_our_words() -> None:
    """Sizes are rounded up to whole tokens; dtypes of 8 bits are ways to keep weights."""
    words = words_of("--width", "1000", "--height", "17", "--lora_weights", "a;b.safetensors;0.5", "c")
    assert words[words.index("--image_size") :][:3] == ["--image_size", "32", "1008"]
    assert words[words.index("--lora_weight") :][:3] == ["--lora_weight", "a;b.safetensors", "c"]
    assert words[words.index("--lora_multiplier") :][:3] == ["--lora_multiplier", "0.5", "1"]

    words = words_of("--flux_dtype", "fp8_e4m3fn", "--t5xxl_dtype", "fp8", "--clip_l_dtype", "float16")
    assert {"--dit_dtype=bfloat16", "--text_encoder_dtype=float16", "--fp8", "--fp8_t5"} <= joined(words)
    assert "--fp8" in words_of("--dtype", "float8_e4m3fn")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_weights", "a;much"], "PATH;STRENGTH"),
        (["--clip_l_dtype", "float16", "--t5xxl_dtype", "float32"], "one dtype"),
        (["--ae_dtype", "fp8"], "--ae_dtype fp8"),
        (["--width", "0"], "--width 0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(argv: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        words_of(*argv)


@pytest.mark.slow_cases("fp8_e4m3fn")
@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3fn"])
def test_options_of_a_line_hold_for_the_next_until_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    models = write_tiny_flux(tmp_path / "models")
    lines = iter(
        ["a cat --w 17 --h 16 --s 1 --n --d 4", "a dog --m 0.5", "a fox --n bad --c 2 --d 6", "", "a hare"]
    )
    monkeypatch.setattr("generation.conversation.line_reader", lambda *said: lambda: next(lines))
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]

    flux_minimal_inference.main(
        [*words, "--dtype", dtype, "--ae_dtype", "float32"]
        + ["--output_dir", str(tmp_path / "out"), "--interactive"]
    )

    made = sorted((tmp_path / "out").glob("*.png"))
    texts = [Image.open(path).info for path in made]
    assert [text["bt_prompt"] for text in texts] == ["a cat", "a fox"]  # there is no LoRA to have a strength
    assert {text["bt_width"] for text in texts} == {"32"}
    assert [text["bt_seeds"] for text in texts] == ["4", "6"]
    assert [text["bt_guidance_scale"] for text in texts] == ["1.0", "2.0"]
    assert "--m 0.5: there are 0 LoRAs" in caplog.text
    assert next(lines) == "a hare"


def test_a_strength_of_a_line_counts_in_the_text_encoders_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, lora = write_tiny_flux(tmp_path / "models"), tmp_path / "lora.safetensors"
    width = load_file(models.clip_l)["text_model.encoder.layers.0.mlp.fc1.weight"].shape
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, width[1])}
        | {f"{name}.lora_up.weight": torch.ones(width[0], 2), f"{name}.alpha": torch.tensor(2.0)},
        lora,
    )
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]
    size = "a cat --w 32 --h 32 --s 1 --d 4"
    said = {"0": [size, f"{size} --m 1"], "1": [size]}  # strength of the command -> lines
    made = []
    for strength, lines in said.items():
        typed = iter([*lines, ""])
        monkeypatch.setattr(
            "generation.conversation.line_reader", lambda *_, typed=typed: lambda: next(typed)
        )
        folder = tmp_path / strength
        given = ["--dtype", "float32", "--output_dir", str(folder), "--lora_weights", f"{lora};{strength}"]
        flux_minimal_inference.main([*words, *given, "--interactive"])
        made += [
            Image.open(path).tobytes()
            for path in sorted(folder.glob("*.png"), key=lambda one: one.stat().st_mtime_ns)
        ]

    assert made[1] == made[2] != made[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"input_hint_block.conv_in.weight": torch.zeros(16, 3, 3, 3)},
            "takes pixels .* as those of XLabs do",
        ),
        (
            {"controlnet_mode_embedder.weight": torch.zeros(4, 128)},
            "is a Union ControlNet that needs the kind",
        ),
        ({"controlnet_x_embedder.weight": torch.zeros(128, 16)}, "token width 16 and 64"),
        ({"controlnet_x_embedder.weight": None}, "--controlnet_model_name_or_path"),
    ],
)
def test_a_control_net_that_cannot_be_used_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    state: dict[str, Tensor | None] = {**tiny_control_net().state_dict(), **change}
    path = tmp_path / "control.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    dit = write_dit(tmp_path, tiny_state("dev", text_dim=T5_DIM, pooled_dim=CLIP_DIM))

    with pytest.raises(CheckpointError, match=says):
        Flux(FluxFiles(dit), controlnet=path).check_named_files()


def test_pictures_and_caches_go_with_a_control_net(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs, table = tiny_inputs("dev"), MediaTable(name="data", kind="image", has_control=True)
    texts = {"t5_out": inputs["t5"], "t5_attn_mask": inputs["t5_mask"], "l_pooled": inputs["pooled"]}
    plain = Flux(FluxFiles(write_dit(tmp_path, tiny_state("dev"))))
    with_control, batch = replace(plain, controlnet=tmp_path), Batch(texts, ("a", "b"), ("a", "b"))
    seen = {**texts, "latents_control": inputs["noisy"]}

    with pytest.raises(DatasetError, match="no ControlNet uses them. Pass --controlnet_model_name_or_path"):
        plain.check_table(table)
    with_control.check_table(table)
    with pytest.raises(DatasetError, match="needs control images. Set control_d"):
        with_control.check_table(replace(table, has_control=False))
    with pytest.raises(CacheError, match="has no latents_control.*flux_cache_latents.py and --controlnet"):
        with_control.batch_conditions(inputs["noisy"], batch)
    assert "latents_control" not in plain.batch_conditions(inputs["noisy"], replace(batch, tensors=seen))
    assert "latents_control in caches is not used" in caplog.text
