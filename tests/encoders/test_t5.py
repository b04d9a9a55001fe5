"""T5-XXL's and ByT5's encoders against recorded numbers and transformers; their files and tokenizers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from encoders.t5 import T5_XXL, T5TextEncoder, byte_rows, load_byt5, read_byt5_header
from encoders.t5_network import T5Kind, T5Network, load_t5, read_t5
from encoders.text_encoder import fill_rows
from modules.errors import CheckpointError
from protocols.family import can_learn
from protocols.requests import Prompt
from tests.encoders.their_t5 import their_t5
from tests.fp8_reference import quantized_layers
from tests.golden_cases import make_weights, read_case
from tests.manifests import fit, tensor_list, write_hollow
from tests.tiny.hunyuan_encoders import prefixed, save
from tests.tiny.picture_encoders import t5xxl_config, t5xxl_tensors, write_t5xxl
from tests.tiny.wan_encoders import t5_comfy_fp8_tensors, t5_hf_tensors, t5_tensors

CPU = torch.device("cpu")
PROMPTS = ("a small rabbit in the grass", "", "two dogs &amp; a   cat, 7:30")
LENGTH = 24
TOLERANCE = 1e-4  # float32: the same operations, in another order


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5xxl(tmp_path_factory.mktemp("models"))


def encoder_of(file: Path, uses_mask: bool = False, **settings: object) -> T5TextEncoder:
    encoder = T5TextEncoder(file, torch.float32, None, LENGTH, uses_mask, **settings)  # type: ignore[arg-type]
    encoder.load(CPU)
    return encoder


def stacked(encoder: T5TextEncoder, *texts: str | Prompt) -> tuple[Tensor, Tensor]:
    found = encoder.encode([Prompt(text) if isinstance(text, str) else text for text in texts])
    return tuple(torch.stack([each[key] for each in found]) for key in ("t5_out", "t5_attn_mask"))  # type: ignore[return-value, misc]


def test_ids_and_states_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("flux_text")
    save(tmp_path / "t5.safetensors", make_weights("t5xxl", case["models"]["t5xxl"]["weights"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(case["tokenizers"]["t5xxl"]), encoding="utf-8")
    for uses_mask, key in ((False, "t5_states"), (True, "t5_states_masked")):
        file = tmp_path / "t5.safetensors"
        encoder = T5TextEncoder(file, torch.float32, None, case["t5_length"], uses_mask)
        encoder.load(CPU)
        states, mask = stacked(encoder, *case["prompts"])
        assert torch.equal(mask, tensors["t5_mask"])
        rows = [encoder._loaded.get()[1].read(text).cut(encoder.max_length).ids for text in case["prompts"]]
        assert torch.equal(fill_rows(rows, case["t5_length"], 0)[0], tensors["t5_ids"])
        kept = states * mask[..., None] if uses_mask else states
        torch.testing.assert_close(kept, tensors[key], atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("uses_mask", [False, True])
def test_states_equal_those_of_transformers(file: Path, uses_mask: bool) -> None:
    """Padding too: Chroma's transformer sees the first row of it."""
    states, mask = stacked(encoder_of(file, uses_mask), *PROMPTS)
    tokenizer = encoder_of(file)._loaded.get()[1]
    rows = [tokenizer.read(text).cut(LENGTH).ids for text in PROMPTS]
    ids = torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows])
    theirs = their_t5(t5xxl_config(), t5xxl_tensors())
    expected = theirs(ids, attention_mask=mask if uses_mask else None).last_hidden_state
    torch.testing.assert_close(states, expected, atol=TOLERANCE, rtol=0)
    assert mask.sum(dim=1).tolist() == [len(row) for row in rows]
    assert rows[1] == [1]  # the end token alone


def test_weights_in_8_bits_stay_near(file: Path) -> None:
    exact = stacked(encoder_of(file), *PROMPTS)[0]
    encoder = encoder_of(file, form="fp8")
    linear = [name for name, part in encoder.network.named_modules() if isinstance(part, nn.Linear)]
    assert list(quantized_layers(encoder.network)) == linear
    apart = (stacked(encoder, *PROMPTS)[0] - exact).norm() / exact.norm()
    assert 1e-4 < apart < 0.2  # two small layers; tests/wan has the same storage in larger ones


def test_weights_that_a_file_has_in_8_bits_are_multiplied_out(tmp_path: Path) -> None:
    plain = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and "Bias" not in name else tensor
        for name, tensor in t5xxl_tensors(dtype=torch.float16).items()
    }
    cast = load_t5(save(tmp_path / "fp8.safetensors", plain), CPU, T5_XXL, torch.float32)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(cast.blocks[1].attn.q.weight, plain[name].float())  # type: ignore[union-attr]
    scaled, meant = t5_comfy_fp8_tensors(t5_tensors())
    table = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    scaled.pop(table)
    found = load_t5(save(tmp_path / "scaled.safetensors", scaled), CPU, T5_XXL, torch.float32)
    torch.testing.assert_close(found.blocks[1].attn.q.weight, meant["blocks.1.attn.q.weight"])  # type: ignore[union-attr]


def test_every_layout_gives_the_same_weights(file: Path, tmp_path: Path) -> None:
    expected = load_t5(file, CPU, T5_XXL).state_dict()
    twice, one = t5xxl_tensors(), torch.ones(2)
    once = {name: tensor for name, tensor in twice.items() if "embed_tokens" not in name}
    layouts = {
        "shared": once,
        "embedded": {name: tensor for name, tensor in twice.items() if name != "shared.weight"},
        "with decoder": once | dict.fromkeys(("decoder.final_layer_norm.weight", "lm_head.weight"), one),
        "all in one": prefixed(twice, "text_encoders.t5xxl.transformer.")
        | dict.fromkeys(("text_encoders.clip_l.transformer.x", "model.diffusion_model.img_in.weight"), one),
        "tower": prefixed(
            {name.removeprefix("encoder."): tensor for name, tensor in once.items() if "shared" not in name}
            | {"embed_tokens.weight": twice["shared.weight"]},
            "module.text_tower.encoder.",
        ),
    }
    for name, stored in layouts.items():
        found = load_t5(save(tmp_path / f"{name}.safetensors", stored), CPU, T5_XXL).state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("manifest", ["t5xxl-single", "t5xxl-hf"])
def test_published_files_fit_at_full_size(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "model.safetensors", tensor_list(manifest))
    network = fit(path, partial(read_t5, kind=T5_XXL), T5Network)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 4762310656
    linear = [part for part in network.blocks.modules() if isinstance(part, nn.Linear)]
    assert len(linear) == 168  # of which a LoRA may be put on each


GATELESS = {
    name.replace("wi_1", "wi"): tensor for name, tensor in t5xxl_tensors().items() if "wi_0" not in name
}


@pytest.mark.parametrize(
    ("message", "tensors"),
    [
        (r"is an umT5 encoder, not a T5.*to --t5xxl", t5_hf_tensors(t5_tensors())),
        (r"is not a T5 encoder; it looks like an unknown model", {"a.weight": torch.ones(2)}),
        (r"first version, whose feed-forward layers have no gate", GATELESS),
    ],
)
def test_other_encoders_are_refused(tmp_path: Path, message: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_t5(save(tmp_path / "model.safetensors", tensors), CPU, T5_XXL)


def test_gradients_reach_what_learns_through_all_blocks_and_8_bit_weights(file: Path) -> None:
    for form in (None, "fp8", "int8", "nf4"):
        encoder = encoder_of(file, form=form)
        assert can_learn(encoder)
        first = encoder.network.blocks[0].attn.q  # type: ignore[union-attr]
        extra = torch.zeros(first.out_features, requires_grad=True)
        first.register_forward_hook(lambda _module, _given, out, extra=extra: out + extra)
        encoder.encode([Prompt(PROMPTS[0])])[0]["t5_out"].square().sum().backward()  # type: ignore[union-attr]
        assert extra.grad is not None
        assert extra.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in encoder.network.parameters())


def test_identity_follows_all_that_an_output_depends_on(file: Path) -> None:
    default = dict(T5TextEncoder(file).identity)
    assert default == dict(T5TextEncoder(file).identity)
    for other in (
        T5TextEncoder(file, torch.float32),
        T5TextEncoder(file, max_length=256),
        T5TextEncoder(file, uses_mask=True),
        T5TextEncoder(file, form="fp8"),
        T5TextEncoder(file, tokenizer=file.parent / "t5xxl" / "spiece.model"),
    ):
        assert dict(other.identity) != default


def test_a_release_holds_it_as_the_second_or_the_only_encoder(file: Path, tmp_path: Path) -> None:
    for folder in ("flux/text_encoder", "flux/text_encoder_2", "chroma/text_encoder"):
        (tmp_path / folder).mkdir(parents=True)
    assert T5TextEncoder(tmp_path / "flux").path == tmp_path / "flux" / "text_encoder_2"
    assert T5TextEncoder(tmp_path / "chroma").path == tmp_path / "chroma" / "text_encoder"
    assert T5TextEncoder(file).path == file


def test_byt5s_ids_and_states_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("hunyuan_image_text")
    path = save(tmp_path / "byt5.safetensors", make_weights("byt5", case["models"]["byt5"]["weights"]))
    network = load_byt5(path, CPU, torch.float32)
    for index, text in enumerate(case["glyph_texts"]):
        if text is None:
            continue
        ids, mask = byte_rows([text], case["byt5_length"])
        assert torch.equal(ids[0], tensors["byt5_ids"][index])
        assert torch.equal(mask[0], tensors["byt5_mask"][index])
        states = network.encode_padded(ids, mask)[0] * mask[0, :, None]
        torch.testing.assert_close(states, tensors["byt5_states"][index], atol=2e-4, rtol=0)
    assert read_byt5_header(path).vocabulary == 1510


def test_a_t5_of_words_is_no_byt5(tmp_path: Path) -> None:
    """Its tensors have the same names, and caching knows no transformer to compare widths with."""
    case, _ = read_case("hunyuan_image_text")
    weights = make_weights("byt5", case["models"]["byt5"]["weights"])
    (name,) = [name for name in weights if name.endswith("shared.weight")]
    weights[name] = weights[name].new_zeros(32128, weights[name].shape[1])
    with pytest.raises(CheckpointError, match=r"has 32128 tokens, parts of words(.|\n)*byt5_small_glyphxl"):
        read_byt5_header(save(tmp_path / "t5.safetensors", weights))


def test_a_long_text_keeps_its_first_bytes_and_the_end_token() -> None:
    ids, mask = byte_rows(["é" * 9, "x"], 6)
    assert ids.tolist() == [[3 + 0xC3, 3 + 0xA9] * 2 + [3 + 0xC3, 1], [3 + 0x78, 1, 0, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [6, 2]


def test_messages_name_the_option_of_each_use(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", {"a.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"is not a ByT5 encoder(.|\n)*to --byt5"):
        load_byt5(path, CPU)
    kind = T5Kind("T5", "a T5 encoder", "--text_encoder2", "t5.safetensors", has_own_tables=False)
    with pytest.raises(CheckpointError, match=r"Pass t5.safetensors to --text_encoder2"):
        load_t5(path, CPU, kind)
