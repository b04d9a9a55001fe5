"""Lumina-Image-2.0 as the shared loops see it: sampling, prompts, sizes, options, and what is refused; its
transformer against recorded vectors and diffusers; its text encoder; and its files.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders.autoencoder import read_autoencoder_header
from generation.denoise import make_latents
from lumina.family import DEFAULTS, Lumina
from lumina.files import LuminaFiles, load_dit
from lumina.official_options import read_minimal, translate_to_generation_argv
from lumina.options import EXTRAS, LuminaTrainingOptions, translate_training
from lumina.text_encoder import GemmaTextEncoder, load_gemma
from lumina_generate_image import DEFAULTS as SCRIPT
from lumina_train_network import DEFAULTS as TRAINING
from modules.errors import CheckpointError, OptionError
from modules.flow.schedule import make_schedule
from modules.parser import add_options
from protocols.family import can_learn
from protocols.loading import Placement
from protocols.requests import Prepared, Prompt, Request
from protocols.steps import EncodedPrompts
from runtime.run_blocks import get_spec
from tests.commands import joined
from tests.golden_cases import FOLDER, load_model, make_weights, read_case
from tests.lumina.making import in_diffusers
from tests.manifests import TensorList, tensor_list, write_hollow
from tests.tiny.dits import dit_called
from tests.tiny.lumina import ALL_IN_ONE, CONFIG, gemma_state, tiny_state, write_dit, write_gemma
from tests.tiny.pieces import train_pieces
from training.image_options import image_training_parser

CPU = torch.device("cpu")
DESCRIPTION, TENSORS = read_case("lumina_sampling")
FLOAT32 = Lumina(LuminaFiles(dit_dtype=torch.float32))


def prepare(**asked: Any) -> Prepared:
    return FLOAT32.prepare(Request("a cat", 7, **asked))


@pytest.mark.parametrize("run", DESCRIPTION["runs"], ids=lambda run: run["name"])
def test_whole_sampling_equals_the_recorded_latents(run: dict[str, Any]) -> None:
    """From the seed to clean latents, with guidance that ends early and is limited."""
    extra = {name: str(run[name]) for name in ("cfg_trunc_ratio", "renorm_cfg")}
    rows, columns = DESCRIPTION["latent_h_w"]
    size = {"width": 8 * columns, "height": 8 * rows, "steps": DESCRIPTION["steps"]}
    prepared = prepare(guidance_scale=run["guidance_scale"], extra=extra, **size)
    prepared = replace(prepared, seed=DESCRIPTION["seed"])

    def text(ending: str) -> dict[str, Tensor | list[Tensor]]:
        names = {"hidden_state": "cap_feats", "attention_mask": "cap_mask"}
        return {ours: TENSORS[theirs + ending][0] for ours, theirs in names.items()}

    calls: list[float] = []

    class Counted(nn.Module):
        def forward(self, noisy: Tensor, times: Tensor, **given: Any) -> Tensor:
            calls.append(float(times[0]))
            found: Tensor = model(noisy, times, **given)
            return found

    model, counted = load_model("lumina_dit", load_dit), Counted()
    prompts = {0: EncodedPrompts(text(""), text("_negative"))}
    latents = make_latents(FLOAT32, lambda _: counted, prepared, prompts, {}, CPU)

    torch.testing.assert_close(latents[:, :, 0], TENSORS[run["name"]], **DESCRIPTION["tolerance"]["latent*"])
    assert len(calls) == DESCRIPTION["steps"] + run["guided_steps"]


def test_the_noise_levels_are_those_recorded() -> None:
    cases = json.loads((FOLDER / "image_schedules.json").read_text(encoding="utf-8"))["cases"]
    for case in (one for one in cases if one["family"] == "lumina"):
        schedule = make_schedule(DEFAULTS.solver, case["steps"], case["shift"])
        torch.testing.assert_close(schedule.sigmas, torch.tensor(case["sigmas"]), atol=2e-6, rtol=0)
        if "time_given_to_model" in case:
            times = 1 - schedule.timesteps / 1000
            torch.testing.assert_close(times, torch.tensor(case["time_given_to_model"]), atol=2e-6, rtol=0)


def test_what_the_release_does_is_the_default() -> None:
    prepared = prepare()
    rules = prepared.rules
    assert (prepared.width, prepared.height, prepared.frames, prepared.steps) == (1024, 1024, 1, 36)
    assert (prepared.guidance_scale, prepared.flow_shift) == ((3.5,), 6)
    assert (rules.max_signal, rules.norm_limit) == (0.25, 1)
    assert prepare(solver="euler").solver == prepared.solver == "euler-trained"
    assert prepare(solver="unipc").solver == "unipc"
    assert prepare(width=100, height=47).width == 96  # cut to whole patches
    unlimited = replace(rules, max_signal=None, norm_limit=None)
    assert prepare(extra={"cfg_trunc_ratio": "1", "renorm_cfg": "0"}).rules == unlimited
    assert FLOAT32.prepare(Request("a cat", 0)).seed == 0


def test_only_the_prompt_is_read_behind_the_system_prompt() -> None:
    texts = prepare(negative_prompt="a cat", nag_prompt="dull").prompts[0]
    assert texts.positive == Prompt("a cat")
    assert texts.negative == Prompt("a cat", is_negative=True)
    assert texts.blank == Prompt("", is_negative=True)
    assert texts.nag == Prompt("dull", is_negative=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cfg_trunc_ratio", "2", "--ctr.*from 0 to 1"),
        ("renorm_cfg", "-1", "--rcfg"),
        ("renorm_cfg", "x", "x"),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        prepare(extra={name: text})


def test_training_has_luminas_names_of_shared_options() -> None:
    parser = image_training_parser(None, TRAINING)
    add_options(parser, LuminaTrainingOptions)

    args = parser.parse_args(["--ae", "ae.safetensors", "--use_flash_attn"])
    translate_training(args)

    assert (args.vae, args.flash_attn, args.discrete_flow_shift) == ("ae.safetensors", True, 6.0)
    assert args.timestep_sampling == "shift"
    for words, said in ((["--use_sage_attn"], "no backward pass"), (["--ae", "a", "--vae", "b"], "pass one")):
        with pytest.raises(OptionError, match=said):
            translate_training(parser.parse_args(words))


def test_the_guides_command_is_that_of_the_generation_script(tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    given = "--pretrained_model_name_or_path d --gemma2_path g --ae_path a --prompt=-x --seed 0 --offload"
    given += " --image_width 1000 --image_height 777 --use_sage_attn --system_prompt Draw."
    minimal = read_minimal(None, [*given.split(), "--lora_weights", f"{lora};0.5", "other"])

    words = translate_to_generation_argv(minimal)

    assert {"--prompt=-x", "--seed=0", "--attn_mode=sageattn", "--system_prompt=Draw."} <= joined(words)
    assert words[words.index("--image_size") :][:3] == ["--image_size", "768", "992"]
    assert words[words.index("--lora_weight") :][:3] == ["--lora_weight", str(lora), "other"]
    assert words[words.index("--lora_multiplier") :][:3] == ["--lora_multiplier", "0.5", "1"]
    with pytest.raises(OptionError, match="PATH;STRENGTH"):
        replace(minimal.model, lora_weights=("a;b",))


def test_prompt_lines_have_the_options_of_lumina_s_guidance() -> None:
    assert {SCRIPT.line_options[character].key for character in ("ctr", "rcfg")} == set(EXTRAS)


def all_in_one() -> TensorList:
    """A file as Neta Lumina's: transformer, text encoder and autoencoder."""
    parts = {
        "model.diffusion_model.": tensor_list("lumina2-dit"),
        ALL_IN_ONE: tensor_list("gemma2-2b-comfy"),
        "vae.": tensor_list("flux1-ae"),
    }
    tensors = {start + name: entry for start, part in parts.items() for name, entry in part.items()}
    beside = {"logit_scale": ("F32", ()), "spiece_model": ("U8", (4096,))}
    return tensors | {f"text_encoders.gemma2_2b.{name}": entry for name, entry in beside.items()}


@pytest.mark.parametrize("alone", [True, False])
def test_published_files_of_full_size_load_without_leftovers(tmp_path: Path, alone: bool) -> None:
    """Alone, and all three networks in one file."""
    tensors = tensor_list("lumina2-dit")
    path = write_hollow(tmp_path / "dit.safetensors", tensors if alone else all_in_one())

    dit = load_dit(path, Placement(torch.device("meta")))

    unused = math.prod(tensors["norm_final.weight"][1])
    assert sum(weight.numel() for weight in dit.parameters()) == 2609771456 - unused
    assert (dit.config.dim, dit.config.num_heads, dit.config.num_kv_heads) == (2304, 24, 8)
    assert (dit.config.num_layers, dit.config.text_dim, dit.compute_dtype) == (26, 2304, torch.bfloat16)
    text = path if not alone else write_hollow(tmp_path / "g.safetensors", tensor_list("gemma2-2b-comfy"))
    gemma = load_gemma(text, torch.device("meta"), torch.bfloat16)
    assert len(gemma.get_submodule("layers")) == 25  # type: ignore[arg-type]
    last = ("model.layers.25.", "model.norm.")  # not needed for the state before it
    left = [shape for name, (_, shape) in tensor_list("gemma2-2b-comfy").items() if not name.startswith(last)]
    assert sum(weight.numel() for weight in gemma.parameters()) == sum(map(math.prod, left))
    if not alone:
        assert read_autoencoder_header(path).latent_channels == 16


def test_files_of_another_network_are_refused(tmp_path: Path) -> None:
    gemma = write_gemma(tmp_path) / "model.safetensors"
    with pytest.raises(CheckpointError, match="is not a Lumina-Image-2.0 transformer; it looks like a Gemma"):
        load_dit(gemma, Placement(CPU))
    gemma_3 = gemma_state() | {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}
    save_file(gemma_3, tmp_path / "gemma3.safetensors")
    for path in (write_dit(tmp_path, tiny_state()), tmp_path / "gemma3.safetensors"):
        with pytest.raises(CheckpointError, match="is not a Gemma 2 language model"):
            load_gemma(path, CPU, torch.float32)


NEAR = 3e-6  # of the largest value: the same formulas in float32, summed in another order


def test_forward_equals_the_recorded_output() -> None:
    description, tensors = read_case("lumina_dit")

    inputs = (tensors[name] for name in ("x", "t", "cap_feats", "cap_mask"))
    direction = load_model("lumina_dit", load_dit)(*inputs)

    torch.testing.assert_close(direction, tensors["out"], **description["tolerance"]["out"])
    expected = tensors["out_qk_eps_1e-5"]
    assert (direction - expected).abs().max() <= NEAR * expected.abs().max()


@pytest.mark.parametrize("batch", [1, 3])
def test_forward_equals_diffusers_with_the_same_weights(batch: int) -> None:
    tiny = dit_called("lumina")
    inputs = tiny.inputs((1, 4, 6, 12), batch)

    direction = tiny.make(CONFIG.num_layers)(**inputs)

    expected = in_diffusers(tiny_state())(*inputs.values()).sample
    assert (direction - expected).abs().max() <= NEAR * expected.abs().max()


SYSTEM = "You are an assistant designed to generate high-quality images based on user prompts."


def tiny_encoder(tmp_path: Path, **settings: object) -> GemmaTextEncoder:
    encoder = GemmaTextEncoder(write_gemma(tmp_path / "gemma"), torch.float32, **settings)  # type: ignore[arg-type]
    encoder.load(CPU)
    return encoder


def test_texts_ids_and_states_equal_those_recorded(tmp_path: Path) -> None:
    description, tensors = read_case("lumina_text")
    recorded = description["models"]["gemma2"]
    folder = write_gemma(tmp_path)
    save_file(make_weights(recorded["weights_model_key"], recorded["weights"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", **recorded["config"]}), "utf-8")

    for with_system in (SYSTEM, ""):
        encoder = GemmaTextEncoder(folder, torch.float32, None, with_system, max_tokens=description["length"])
        encoder.load(CPU)
        cases = [n for n, case in enumerate(description["texts"]) if case["system_prompt"] == with_system]
        texts = [description["texts"][number] for number in cases]
        prompts = [Prompt(case["prompt"], is_negative=case["is_negative"]) for case in texts]
        with torch.no_grad():
            encoded = encoder.encode(prompts)

        assert [encoder.apply_template(prompt).text for prompt in prompts] == [case["text"] for case in texts]
        for number, found in zip(cases, encoded, strict=True):
            assert torch.equal(found["input_ids"], tensors["ids"][number])  # type: ignore[arg-type]
            assert torch.equal(found["attention_mask"], tensors["mask"][number])  # type: ignore[arg-type]
            torch.testing.assert_close(found["hidden_state"], tensors["states"][number], atol=3e-4, rtol=0)


def test_a_negative_prompt_has_the_system_prompt_only_if_asked_for(tmp_path: Path) -> None:
    folder = write_gemma(tmp_path)
    for in_negative, expected in ((False, "dull"), (True, "Draw. <Prompt Start> dull")):
        encoder = GemmaTextEncoder(folder, system_prompt="Draw.", in_negative=in_negative)
        assert encoder.apply_template(Prompt("dull", is_negative=True)).text == expected
        assert encoder.apply_template(Prompt("dull")).text == "Draw. <Prompt Start> dull"
    assert Prompt("dull") != Prompt("dull", is_negative=True)  # what the cache of a session looks up


def test_gradients_flow_and_a_lora_finds_the_layers(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path, max_tokens=16)
    assert can_learn(encoder)
    assert encoder.lora_prefix == "lora_te"
    weight = encoder.network.get_parameter("layers.0.mlp.up_proj.weight").requires_grad_()

    encoder.encode([Prompt("a cat")])[0]["hidden_state"].sum().backward()  # type: ignore[union-attr]

    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    assert [len(blocks) for blocks in get_spec(encoder.network).blocks(encoder.network).values()] == [2]


def test_the_tokenizer_inside_a_file_is_that_beside_it(tmp_path: Path) -> None:
    """SentencePiece bytes as ComfyUI puts them into the file."""
    model = train_pieces(tokens=60)
    folder = write_gemma(tmp_path / "gemma")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    beside = GemmaTextEncoder(folder, torch.float32, max_tokens=16)
    alone = tmp_path / "alone"
    alone.mkdir()
    weights = load_file(folder / "model.safetensors")
    blob = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file(weights | {"spiece_model": blob}, alone / "gemma.safetensors")
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    inside = GemmaTextEncoder(alone / "gemma.safetensors", torch.float32, max_tokens=16)
    found = []
    for encoder in (beside, inside):
        encoder.load(CPU)
        with torch.no_grad():
            found.append(encoder.encode([Prompt("a red cat")])[0])

    assert found[0]["input_ids"][0] == 2  # type: ignore[index]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])  # type: ignore[arg-type]
    assert inside.identity["gemma2_tokenizer"] == "inside the checkpoint"
