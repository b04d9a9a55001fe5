"""A tiny HiDream-O1-Image, its inputs, and the plain network with the same weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hidream_o1.configs import HiDreamO1Config
from hidream_o1.model import HiDreamO1Model
from hidream_o1.texts import REFERENCE_ID
from tests.hidream_o1.plain import PlainHiDreamO1, Shape, edit_clean, predict_clean
from tests.tiny.dit_files import draw_state, frozen
from tests.tiny.hidream_o1 import CONFIG, DEEP_LAYERS, VISION, tower_state

SMALL = HiDreamO1Config(
    dim=64,
    ffn_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    num_layers=3,
    vocabulary=50,
    bottleneck=16,
    patch_size=4,
    freq_dim=32,
)
LENGTHS = (13, 6)  # tokens of each text with its time
TIMES = (640.0, 77.0)


def shape_of(config: HiDreamO1Config = CONFIG) -> Shape:
    sections = (config.head_width // 2 - 2 * config.row_frequencies, *[config.row_frequencies] * 2)
    return Shape(config.num_layers, config.head_width, sections, config.patch_size, config.freq_dim)


def small_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights with sharp attention, so that no mistake in it stays below the tolerance."""
    state = draw_state(lambda: HiDreamO1Model(SMALL), seed)
    sharp = {name: 2 * tensor for name, tensor in state.items() if "q_norm" in name or "k_norm" in name}
    loud = "language_model.embed_tokens.weight"  # as large as other tokens
    return {**state, **sharp, loud: state[loud] * SMALL.dim**0.5}


def small_model(seed: int = 0) -> HiDreamO1Model:
    return frozen(HiDreamO1Model(SMALL), small_state(seed))


def small_inputs(batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    size = SMALL.patch_size
    return {
        "noisy": 3 * torch.randn(batch, 3, 1, rows * size, columns * size, generator=generator),
        "timesteps": torch.tensor(TIMES)[:batch],
        "text": torch.randint(SMALL.vocabulary, (batch, longest), generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
    }


def plain_model(seed: int = 0) -> PlainHiDreamO1:
    network = PlainHiDreamO1(small_state(seed))
    return network.requires_grad_(False)


def predict_plainly(
    network: PlainHiDreamO1, given: Mapping[str, Tensor], mistake: str = "", config: HiDreamO1Config = SMALL
) -> Tensor:
    """What the plain network makes of the inputs of ours, B 3 1 H W."""
    made = []
    for index, noisy in enumerate(given["noisy"].squeeze(2)):
        ids = given["text"][index][given["text_mask"][index]].tolist()
        sigma = float(given["timesteps"][index]) / 1000
        made.append(predict_clean(network, shape_of(config), ids, noisy, sigma, mistake))
    return torch.stack(made).unsqueeze(2)


# edits

EDITING = replace(SMALL, vision=replace(VISION, deep_layers=DEEP_LAYERS))
# of references in patches, and of their small copies in tokens
REFERENCE_SIZES = ((2, 3), (4, 2), (3, 3))
LOOK_SIZES = ((1, 2), (3, 1), (2, 2))


def edit_state() -> dict[str, Tensor]:
    return {**small_state(), **tower_state(DEEP_LAYERS)}


def edit_model() -> HiDreamO1Model:
    return frozen(HiDreamO1Model(EDITING), edit_state())


def public_tower(state: Mapping[str, Tensor], deep_layers: Sequence[int]) -> Any:
    """transformers' tower with the weights of a file."""
    from transformers import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=VISION.num_layers,
        hidden_size=VISION.dim,
        intermediate_size=VISION.ffn_dim,
        num_heads=VISION.num_heads,
        out_hidden_size=VISION.out_dim,
        num_position_embeddings=VISION.position_side**2,
        deepstack_visual_indexes=list(deep_layers),
    )
    tower = Qwen3VLVisionModel._from_config(config, attn_implementation="eager").eval()
    for name, parameter in tower.named_parameters():
        parameter.data = state[f"visual.{name}"].clone()
    return tower.requires_grad_(False)


def look_with(tower: Any, small: Sequence[Image.Image]) -> tuple[Tensor, list[Tensor]]:
    """What transformers' processor and tower make of pictures: rows for their tokens, and those of layers."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=256 * 256,
        max_pixels=1 << 24,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    inputs = processor(images=list(small), return_tensors="pt")
    seen = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return seen.pooler_output, list(seen.deepstack_features)


def edit_inputs(number: int, batch: int = 2) -> dict[str, Any]:
    """Inputs of our network with references, in texts of unequal lengths."""
    generator = torch.Generator().manual_seed(8)
    inputs: dict[str, Any] = small_inputs(batch)
    size = SMALL.patch_size
    inputs["references"] = [
        2 * torch.rand(batch, 3, 1, rows * size, columns * size, generator=generator) - 1
        for rows, columns in REFERENCE_SIZES[:number]
    ]
    sizes = LOOK_SIZES[:number]
    count = sum(rows * columns for rows, columns in sizes)
    inputs["shown"] = torch.randint(256, (batch, count, 3 * 32**2), generator=generator, dtype=torch.uint8)
    inputs["grids"] = torch.tensor(sizes).expand(batch, -1, -1)
    words = [torch.full((batch, rows * columns), REFERENCE_ID) for rows, columns in sizes]
    word = torch.full((batch, 1), 5)
    written = [part for tokens in words for part in (word, tokens, word)]
    added = sum(part.shape[1] for part in written)
    inputs["text"] = torch.cat([word, *written, inputs["text"]], dim=1)
    inputs["text_mask"] = torch.cat(
        [torch.ones(batch, 1 + added, dtype=torch.bool), inputs["text_mask"]], dim=1
    )
    return inputs


def looks_of(number: int) -> list[tuple[int, int, int]]:
    """Where `edit_inputs` has the tokens of references in its texts."""
    looks, at = [], 1
    for rows, columns in LOOK_SIZES[:number]:
        looks.append((at + 1, rows, columns))
        at += rows * columns + 2
    return looks


def look_at(tower: Any, shown: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
    """What transformers' tower makes of cached pixels of tokens, n K uint8: rows, and those of layers."""
    rows, deep = [], []
    parts = shown.split([height * width for height, width in sizes])
    for tokens, (height, width) in zip(parts, sizes, strict=True):
        pixels = tokens.view(height, width, 32, 32, 3).transpose(1, 2).reshape(32 * height, -1, 3)
        patches = pixels.view(height, 2, 16, width, 2, 16, 3).permute(0, 3, 1, 4, 6, 2, 5)
        values = patches.reshape(-1, 3, 1, 16, 16).expand(-1, -1, 2, -1, -1).flatten(1)
        found = tower(values / 127.5 - 1, grid_thw=torch.tensor([[1, 2 * height, 2 * width]]))
        rows.append(found.pooler_output)
        deep.append(found.deepstack_features)
    return torch.cat(rows), [torch.cat(layer) for layer in zip(*deep, strict=True)]


def edit_plainly(given: Mapping[str, Any], number: int, mistake: str = "") -> Tensor:
    """What the plain network and transformers' tower make of the inputs of ours, B 3 1 H W."""
    network = plain_editor(edit_state(), DEEP_LAYERS).requires_grad_(False)
    made = []
    for index, noisy in enumerate(given["noisy"].squeeze(2)):
        rows, deep = look_at(network.visual, given["shown"][index], LOOK_SIZES[:number])
        made.append(
            edit_clean(
                network,
                shape_of(SMALL),
                given["text"][index][given["text_mask"][index]].clamp(min=0).tolist(),
                noisy,
                float(given["timesteps"][index]) / 1000,
                [pixels[index, :, 0] for pixels in given["references"]],
                looks_of(number),
                rows,
                deep,
                mistake,
            )
        )
    return torch.stack(made).unsqueeze(2)


def plain_editor(state: Mapping[str, Tensor], deep_layers: Sequence[int] = ()) -> PlainHiDreamO1:
    """The plain network, and transformers' tower as its `visual`."""
    bare = {name: value for name, value in state.items() if not name.startswith("visual.")}
    network = PlainHiDreamO1(bare)
    network.visual = public_tower(state, deep_layers)
    return network
