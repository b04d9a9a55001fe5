"""Language models as encoders against the whole networks of transformers: layouts, states, fp8, bad files."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.opening import open_checkpoint
from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import (
    LanguageEncoderSettings,
    LanguageModelEncoder,
    qwen3_chat,
    qwen_tokenizer,
)
from encoders.language_models import (
    LLAMA,
    QWEN3,
    QWEN3_VL,
    QWEN25_VL,
    SPEC,
    WORKING,
    LanguageModel,
    load_language_model,
    plan_streamed_layers,
    read_language_model,
)
from encoders.picture_prompts import load_vision_tower
from encoders.text_encoder import TokenizerSource
from flux_2.versions import MISTRAL3
from modules.errors import CheckpointError
from protocols.requests import Prompt
from tests.manifests import tensor_list, write_hollow
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import swapped
from tests.tiny.hunyuan_encoders import llama_tensors, save, save_sharded, scaled_fp8
from tests.tiny.language_models import (
    DIM,
    LAYERS,
    QWEN3_TEMPLATE,
    config_json,
    layouts,
    mistral3,
    qwen3,
    qwen3_vl,
    qwen25_vl,
    write_mistral_tokenizer,
    write_model,
    write_qwen_tokenizer,
)
from tests.tiny.language_models import qwen_tokenizer as tiny_tokenizer

CPU = torch.device("cpu")
TOLERANCE = 1e-5  # of the largest number, float32: the same operations, sums of padded rows in another order
PROMPTS = ("a rabbit in the grass", "", "日本 🐇 don't   blink\n", "the rabbit runs through tall grass " * 9)
SOURCE = qwen_tokenizer("--text_encoder_tokenizer", "Qwen/Qwen3-4B")
BEFORE, AFTER = qwen3_chat(thinks=True)
Z_IMAGE = LanguageEncoderSettings("llm", "llm_embed", QWEN3, SOURCE, 128, BEFORE, AFTER, states=(-2,))
QWEN_IMAGE = LanguageEncoderSettings(
    "vl", "vl_embed", QWEN25_VL, SOURCE, 128, BEFORE, AFTER, num_dropped_tokens=None
)
KLEIN = replace(Z_IMAGE, states=(1, 2, 3), pad_token="<|endoftext|>", mask_key="mask")
STACKED = LanguageEncoderSettings(
    *("vl", "krea2_vl_embed", QWEN3_VL, SOURCE, 128, BEFORE, AFTER, None),
    stacked_states=(0, 1, 3),
    keeps_template_suffix=True,
    batch_size=1,
)
MISTRAL_SOURCE = TokenizerSource(
    TokenizerFiles("--text_encoder_tokenizer", ("tokenizer.json",), "", "mistralai/Mistral", (".",)),
    adds_own=False,
)
FLUX2 = LanguageEncoderSettings(
    *("m3", "ctx_vec", MISTRAL3, MISTRAL_SOURCE, 128),
    template_prefix="<s>[SYSTEM_PROMPT]Draw.[/SYSTEM_PROMPT][INST]",
    template_suffix="[/INST]",
    states=(1, 2, 3),
    pad_token="<pad>",
    pads_left=True,
)
FULL = {"qwen3": qwen3, "qwen25_vl": qwen25_vl, "qwen3_vl": qwen3_vl, "mistral3": mistral3}
USES = {
    "qwen3_vl": STACKED,
    "qwen3": Z_IMAGE,
    "qwen3 padded": KLEIN,
    "qwen25_vl": QWEN_IMAGE,
    "mistral3": FLUX2,
}


def encoded(encoder: LanguageModelEncoder, *prompts: str) -> list[dict[str, Tensor]]:
    encoder.load(CPU)
    with torch.no_grad():
        found = encoder.encode([Prompt(prompt) for prompt in prompts])
    return [
        {key: value[0] if isinstance(value, list) else value for key, value in one.items()} for one in found
    ]


def expected(
    model: Any, encoder: LanguageModelEncoder, prompts: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """The joined states of the whole network, rows padded as the encoder's, and the masks."""
    use, tokenizer = encoder.settings, encoder._loaded.get()[1]
    rows = [tokenizer.read(f"{use.template_prefix}{prompt}{use.template_suffix}").ids for prompt in prompts]
    dropped = encoder.count_template_tokens(tokenizer)
    length = max(map(len, rows)) if use.pad_token is None else dropped + use.max_length
    pad = tokenizer.token_to_id(use.pad_token) if use.pad_token else 0
    found = []
    for row in rows:
        row = row[:length]
        filler, real = [pad] * (length - len(row)), [1] * len(row)
        ids = [*filler, *row] if use.pads_left else [*row, *filler]
        seen = [*[0] * len(filler), *real] if use.pads_left else [*real, *[0] * len(filler)]
        mask = torch.tensor([seen])
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([ids]), attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states
        read = [states[index][0, dropped:] for index in use.stacked_states or use.states]
        found.append((torch.stack(read, 1) if use.stacked_states else torch.cat(read, -1), mask[0, dropped:]))
    return found


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5", "old multimodal", "bare", "comfy"])
@pytest.mark.parametrize("name", USES)
def test_states_are_those_of_the_whole_network(name: str, layout: str, tmp_path: Path) -> None:
    use, model = USES[name], FULL[name.split()[0]]()
    path = write_model(tmp_path / "model.safetensors", model, layout)
    write = write_mistral_tokenizer if name == "mistral3" else write_qwen_tokenizer
    encoder = LanguageModelEncoder(use, path, torch.float32, write(tmp_path / "tokenizer"))

    found = encoded(encoder, *PROMPTS)

    for one, (states, mask) in zip(found, expected(model, encoder, PROMPTS), strict=True):
        assert one.keys() == encoder.keys
        ours = one[use.states_key]
        assert_close(ours, states if use.pad_token is not None else states[mask.bool()])
        assert ours.untyped_storage().nbytes() == ours.nbytes
        assert not use.mask_key or torch.equal(one[use.mask_key], mask)


@pytest.mark.parametrize(
    ("manifest", "model", "layers", "heads"),
    [
        ("qwen3-4b", QWEN3, 36, (32, 8, 128)),
        ("qwen3-8b", QWEN3, 36, (32, 8, 128)),
        ("qwen2.5-vl-7b", QWEN25_VL, 28, (28, 4, 128)),
        ("qwen3-vl-4b", QWEN3_VL, 36, (32, 8, 128)),
    ],
)
def test_published_files_fit_at_full_size(
    manifest: str, model: LanguageModel, layers: int, heads: tuple[int, int, int], tmp_path: Path
) -> None:
    """Loading raises for every tensor that is left over."""
    tensors = tensor_list(manifest)
    path, meta = write_hollow(tmp_path / "model.safetensors", tensors), torch.device("meta")
    with open_checkpoint(path) as checkpoint:
        config = read_language_model(checkpoint, model).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_width) == (layers, *heads)
    assert (config.theta, config.eps) == (5e6 if model is QWEN3_VL else 1e6, 1e-6)
    network = load_language_model(path, model, meta, torch.bfloat16)
    others = ("lm_head", "visual.", "model.visual.")
    sizes = [math.prod(one) for name, (_, one) in tensors.items() if not name.startswith(others)]
    assert sum(weight.numel() for weight in network.parameters()) == sum(sizes)
    cut = load_language_model(path, model, meta, torch.bfloat16, (9, 18, 27))
    assert len(cut.layers) == 27  # type: ignore[arg-type]
    if model.tower is not None:
        tower: Any = load_vision_tower(path, model, meta, torch.bfloat16)
        told = tower.config
        assert (told.num_heads, told.out_hidden_size) == (16, config.dim)
    if model is QWEN3_VL:
        rope: Any = network.config
        assert list(rope.rope_parameters["mrope_section"]) == [24, 20, 20]
        assert list(told.deepstack_visual_indexes) == [5, 11, 17]
        assert (told.depth, told.patch_size, tower.num_grid_per_side) == (24, 16, 48)
    if model is QWEN25_VL:
        assert told.window_size == 112
        assert list(told.fullatt_block_indexes) == [7, 15, 23, 31]


def test_files_cut_behind_the_states_serve_and_shorter_ones_are_refused(tmp_path: Path) -> None:
    model = qwen3()
    full = layouts(model)["transformers 4"]
    left_out = ("model.layers.3.", "model.norm.", "lm_head.")
    cut = {name: tensor for name, tensor in full.items() if not name.startswith(left_out)}
    path = save(write_qwen_tokenizer(tmp_path) / "cut.safetensors", cut)
    encoder = LanguageModelEncoder(KLEIN, path, torch.float32)

    ours = encoded(encoder, "a rabbit")[0]["llm_embed"]

    assert len(encoder.network.layers) == 3  # type: ignore[arg-type]
    assert_close(ours, expected(model, encoder, ["a rabbit"])[0][0])
    with pytest.raises(CheckpointError, match=r"has only 3 layers, but 4 are needed.*--text_encoder"):
        load_language_model(path, QWEN3, CPU, torch.float32, (2, 4))


def test_a_prompt_is_cut_before_the_text_that_stays(tmp_path: Path) -> None:
    path = write_model(write_qwen_tokenizer(tmp_path) / "model.safetensors", model := qwen3_vl())
    encoder = LanguageModelEncoder(STACKED, path, torch.float32)
    prompts = [*PROMPTS, long := "the rabbit runs through tall grass " * 40]
    found = encoded(encoder, *prompts)

    read = encoder._loaded.get()[1].read
    before, after = read(BEFORE).ids, read(AFTER).ids
    ids = [*read(f"{BEFORE}{long}").ids[: len(before) + 128 - len(after)], *after]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected_one = torch.stack([states[index][0, len(before) :] for index in STACKED.stacked_states], 1)
    assert expected_one.shape == (128, 3, DIM)
    assert len(encoder.network.layers) == 3  # type: ignore[arg-type]
    assert_close(found[-1]["krea2_vl_embed"], expected_one)
    for prompt, together in zip(prompts, found, strict=True):
        (alone,) = encoded(encoder, prompt)
        assert torch.equal(alone["krea2_vl_embed"], together["krea2_vl_embed"])
    counted, end = encoder.token_counter()(long), len(read(f"{BEFORE}{long}").ids) - len(before)
    assert (counted.tokens, counted.is_cut) == (end + len(after), True)
    own = read(f"{BEFORE}{long[: counted.num_read]}").ids
    assert len(own) == len(before) + 128 - len(after)


def test_a_folder_of_shards_and_that_of_a_release_load(tmp_path: Path) -> None:
    model = qwen3()
    write_model(tmp_path / "one" / "model.safetensors", model)
    save_sharded(tmp_path / "release" / "text_encoder", layouts(model)["transformers 4"])
    for folder in (tmp_path / "one", tmp_path / "release" / "tokenizer"):
        write_qwen_tokenizer(folder)

    one = encoded(LanguageModelEncoder(Z_IMAGE, tmp_path / "one", torch.float32), "a rabbit")
    release = encoded(LanguageModelEncoder(Z_IMAGE, tmp_path / "release", torch.float32), "a rabbit")

    assert torch.equal(one[0]["llm_embed"], release[0]["llm_embed"])


def test_without_its_configuration_qwen3_vl_is_the_released_one(tmp_path: Path) -> None:
    model = qwen3_vl()
    tensors = layouts(model)
    save_sharded(tmp_path / "whole", tensors["transformers 5"])
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config_json(model)), encoding="utf-8")
    file = save(tmp_path / "one" / "qwen3vl_4b_bf16.safetensors", tensors["comfy"])
    uses = [LanguageModelEncoder(STACKED, path, torch.float32) for path in (tmp_path / "whole", file)]
    for encoder in uses:
        write_qwen_tokenizer(encoder.path if encoder.path.is_dir() else encoder.path.parent)
    full, one = (encoded(encoder, "a rabbit")[0]["krea2_vl_embed"] for encoder in uses)
    assert torch.equal(full, one)


@pytest.mark.parametrize(
    ("ending", "name", "layout"),
    [
        *((end, "qwen3", "transformers 4") for end in (".scale_weight", ".weight_scale")),
        (".scale_weight", "qwen3_vl", "transformers 5"),
    ],
)
def test_a_scaled_fp8_file_is_multiplied_out_or_stays(
    ending: str, name: str, layout: str, tmp_path: Path
) -> None:
    model, use = FULL[name](), USES[name]
    stored, meant = scaled_fp8(layouts(model)[layout])
    stored = {name.replace(".scale_weight", ending): tensor for name, tensor in stored.items()}
    model.load_state_dict(meant)
    path = save(write_qwen_tokenizer(tmp_path) / "fp8.safetensors", stored)
    encoder = LanguageModelEncoder(use, path, torch.float32)
    ours = encoded(encoder, "a rabbit")[0][use.states_key]

    (states, _), *_ = expected(model, encoder, ["a rabbit"])
    assert_close(ours, states)
    kept = LanguageModelEncoder(use, path, torch.float32, form="fp8")
    assert_close(encoded(kept, "a rabbit")[0][use.states_key], states)
    assert kept.network.get_parameter("layers.0.mlp.up_proj.weight").dtype == torch.float8_e4m3fn
    assert kept.identity != encoder.identity


def test_identity_follows_what_a_state_depends_on(tmp_path: Path) -> None:
    path = write_model(write_qwen_tokenizer(tmp_path) / "model.safetensors", qwen3())
    plain = dict(LanguageModelEncoder(Z_IMAGE, path).identity)

    assert plain == dict(LanguageModelEncoder(Z_IMAGE, path, on_cpu=True).identity)
    others = (
        replace(Z_IMAGE, states=(-1,)),
        replace(Z_IMAGE, template_suffix=qwen3_chat(thinks=False)[1]),
        replace(Z_IMAGE, final_norm=True),
    )
    found = [plain, *(dict(LanguageModelEncoder(use, path).identity) for use in others)]
    assert len({json.dumps(one) for one in found}) == 4


@pytest.mark.parametrize("thinks", [True, False])
def test_the_chat_is_what_the_template_of_transformers_writes(thinks: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=QWEN3_TEMPLATE)
    before, after = qwen3_chat(thinks)
    for prompt in PROMPTS:
        chat, how = [{"role": "user", "content": prompt}], {"tokenize": False, "add_generation_prompt": True}
        written = tokenizer.apply_chat_template(chat, enable_thinking=thinks, **how)
        assert f"{before}{prompt}{after}" == written


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_both_forms_of_qwens_tokenizer_give_its_tokens(form: str, tmp_path: Path) -> None:
    folder = write_qwen_tokenizer(tmp_path, form)
    ours, theirs = SOURCE.load(folder, tmp_path, "test"), tiny_tokenizer()
    for text in (*PROMPTS, f"{BEFORE}Ⅷ ﬁ e\u0301 1234 <|image_pad|><think>{AFTER}"):
        assert ours.read(text).ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.token_to_id("</think>") == theirs.token_to_id("</think>")


def test_a_damaged_vocabulary_is_one_message(tmp_path: Path) -> None:
    folder = write_qwen_tokenizer(tmp_path, "vocab.json")
    (folder / "vocab.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"vocab.json cannot be read as a tokenizer"):
        SOURCE.load(folder, tmp_path, "test")


@pytest.mark.parametrize(
    ("part", "packed", "form"),
    [
        ("weight", {"qweight": torch.ones(2, 2, dtype=torch.int32)}, "GPTQ or AWQ"),
        ("weight", {"weight": torch.ones(2, 2, dtype=torch.uint8), "weight_scale_2": torch.ones(1)}, "nvfp4"),
        ("", {"weight.absmax": torch.ones(1)}, "bitsandbytes without a state"),
    ],
)
def test_a_quantised_file_is_called_so(
    part: str, packed: dict[str, Tensor], form: str, tmp_path: Path
) -> None:
    tensors = llama_tensors()
    layer = next(name for name in tensors if name.endswith("q_proj.weight")).removesuffix("weight")
    tensors.pop(f"{layer}{part}", None)
    tensors |= {f"{layer}{name}": tensor for name, tensor in packed.items()}
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"is quantized in a way that is not supported.*{form}"):
        load_language_model(tmp_path / "model.safetensors", LLAMA, CPU, torch.float32)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *[("qwen3", QWEN25_VL), ("qwen25_vl", QWEN3), ("mistral3", QWEN3), ("qwen3", MISTRAL3)],
        *[("qwen3", QWEN3_VL), ("qwen3_vl", QWEN3), ("qwen25_vl", QWEN3_VL)],
    ],
)
def test_another_language_model_is_refused_by_name(given: str, wanted: LanguageModel, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", FULL[given]())
    with pytest.raises(
        CheckpointError, match=rf"is not {wanted.description}; it looks like .*\n.*to {wanted.option}"
    ):
        load_language_model(path, wanted, CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing: layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", None, "missing: norm.weight"),
        ("model.layers.0.mlp.gate_proj.weight", None, "incomplete"),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(3, 3), "the file has 3 x 3, 96 x 64 is needed"),
        ("model.embed_tokens.weight", torch.ones(5), "cannot be divided into heads"),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(33), "cannot be divided into heads of 33"),
        ("model.layers.0.self_attn.k_proj.weight", torch.ones(7, DIM), "7 of keys cannot be divided"),
        ("model.layers.0.self_attn.surplus", torch.ones(2), "unexpected: layers.0.self_attn.surplus"),
        ("other.weight", torch.ones(2), "1 tensors of an unknown network"),
        ("model.norm.weight", torch.full((DIM,), torch.nan), "NaN"),
    ],
)
def test_a_file_that_does_not_fit_is_one_message(
    name: str, tensor: Tensor | None, message: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.safetensors", qwen3(), change={name: tensor})
    with pytest.raises(CheckpointError, match=message):
        load_language_model(path, QWEN3, CPU, torch.float32)


def test_a_width_that_is_no_multiple_of_the_heads_is_one_message(tmp_path: Path) -> None:
    tensors = {**llama_tensors(), "embed_tokens.weight": torch.ones(640, 17)}
    with pytest.raises(CheckpointError, match="cannot be divided into heads"):
        load_language_model(save(tmp_path / "model.safetensors", tensors), LLAMA, CPU, torch.float32)


SECTIONS = ([8, 0, 0], [4, 4], [3, 3, 3], "abc", [1e400, 1, 1])


@pytest.mark.parametrize(
    "told",
    [
        *({"rms_norm_eps": "a"}, {"rope_parameters": [1]}, {"rope_theta": None}, {"rms_norm_eps": -1}),
        *({"rms_norm_eps": math.nan}, {"rope_theta": 0}),
        *({"rope_scaling": {"type": "mrope", "mrope_section": sections}} for sections in SECTIONS),
    ],
)
def test_a_configuration_without_sense_is_one_message(told: dict[str, Any], tmp_path: Path) -> None:
    name, model = ("qwen2_5_vl", QWEN25_VL) if "rope_scaling" in told else ("qwen3", QWEN3)
    path = write_model(tmp_path / "model.safetensors", qwen3() if model is QWEN3 else qwen25_vl())
    config = {"model_type": name, "hidden_size": DIM, "num_attention_heads": 4, **told}
    path.with_name("config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="config.json"):
        load_language_model(path, model, CPU, torch.float32)


def test_layers_follow_from_the_file(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path / "model.safetensors", mistral3())) as checkpoint:
        config = read_language_model(checkpoint, MISTRAL3).config
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_width) == (LAYERS, 4, 2, 32)
    assert (config.theta, config.eps, config.final_norm) == (1e9, 1e-5, True)


def test_as_many_layers_wait_in_host_memory_as_do_not_fit(tmp_path: Path) -> None:
    path = write_model(write_qwen_tokenizer(tmp_path) / "model.safetensors", qwen3())
    network = load_language_model(path, QWEN3, CPU, torch.bfloat16)
    sizes = [sum(one.nbytes for one in layer.parameters()) for layer in network.get_submodule("layers")]
    full = sum(sizes) + network.get_parameter("embed_tokens.weight").nbytes + WORKING
    with open_checkpoint(path) as checkpoint:
        plan = read_language_model(checkpoint, QWEN3)
        rooms = (None, full, full - 1, full - sizes[0] - 1, 0)
        counts = [plan_streamed_layers(plan, torch.bfloat16, None, room) for room in rooms]
        small = {
            form: plan_streamed_layers(plan, torch.bfloat16, form, 0)[1] for form in ("fp8", "int8", "nf4")
        }
    assert counts == [(0, 0), (0, sizes[0]), (1, sizes[0]), (2, sizes[0]), (LAYERS - 1, sizes[0])]
    assert sizes[0] / 2 < small["fp8"] < small["int8"] < sizes[0]  # norms have 16 bits, int8 scales
    for form in ("int8", "nf4"):
        kept = load_language_model(path, QWEN3, CPU, torch.bfloat16, form=form).get_submodule("layers.0")
        assert small[form] == sum(one.nbytes for one in (*kept.parameters(), *kept.buffers()))
    encoder = LanguageModelEncoder(Z_IMAGE, path)
    assert encoder.offloaded_bytes(0) == (LAYERS - 2) * sizes[0]  # its last layer is not run
    assert LanguageModelEncoder(Z_IMAGE, path, on_cpu=True).offloaded_bytes(0) == 0


@pytest.mark.parametrize("form", [None, "fp8", "nf4"])
def test_layers_copied_before_they_run_give_the_same_states(form: str | None, tmp_path: Path) -> None:
    """Host memory is useless for computing, and copies arrive at the last moment."""
    path = write_model(write_qwen_tokenizer(tmp_path) / "model.safetensors", qwen3())
    plain, streamed = (LanguageModelEncoder(KLEIN, path, torch.float32, form=form) for _ in range(2))
    resident, device = encoded(plain, *PROMPTS), FakeDevice()
    streamed.load(CPU)
    swapped(streamed.network, SPEC, 2, device)

    for _ in range(2):
        for one, expected_one in zip(encoded(streamed, *PROMPTS), resident, strict=True):
            assert torch.equal(one["llm_embed"], expected_one["llm_embed"])
    assert device.log
