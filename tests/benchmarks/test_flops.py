"""The operations that utilisation is computed from are those that torch counts."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Work, joint_work, lumina_work, wan_work
from benchmarks.gpu_families import FAMILIES, SIGLIP_TOKENS, Drawn
from flux.model import FluxModel
from frame_pack.model import FramePackModel
from hunyuan_image.model import HunyuanImageModel
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.model import HunyuanVideoModel
from lumina.model import LuminaModel
from tests.tiny import flux, framepack_dit, hunyuan_image, lumina
from wan.configs import WanConfig
from wan.model import WanModel

WAN_14B = WanConfig(5120, 13824, 256, 4096, 40, 40, 16, 16)
TINY_WAN = WanConfig(
    dim=256, ffn_dim=512, freq_dim=32, text_dim=32, num_heads=2, num_layers=2, in_dim=16, out_dim=16
)
ONE = torch.zeros(1)


def test_a_pass_of_wan_takes_as_many_operations_as_torch_counts() -> None:
    model = WanModel(TINY_WAN)
    counted = _operations_of_blocks(
        model, lambda: model(torch.zeros(1, 16, 4, 16, 16), ONE, torch.zeros(1, 512, 32))
    )
    assert counted == wan_work(TINY_WAN, video_tokens=4 * 8 * 8).forward


def test_a_pass_of_wan_5b_takes_as_many_operations_as_torch_counts() -> None:
    """Its latents have 48 channels, and are as large a token as those of the others."""
    config = replace(TINY_WAN, in_dim=48, out_dim=48)
    model, shape = WanModel(config), (1, 48, 3, 8, 12)
    counted = _operations_of_blocks(model, lambda: model(torch.zeros(shape), ONE, torch.zeros(1, 512, 32)))
    assert counted == FAMILIES["wan"].work(config, shape, 256).forward


def test_a_pass_of_hunyuan_video_takes_as_many_operations_as_torch_counts() -> None:
    config = HunyuanVideoConfig(256, 512, 2, 2, 3, 1, 512, 16, 16, 32, 32)
    model = HunyuanVideoModel(config)
    noisy, llama, pooled = torch.zeros(1, 16, 2, 8, 8), torch.zeros(1, 20, 32), torch.zeros(1, 32)
    counted = _operations_of_blocks(model, lambda: model(noisy, ONE, llama, torch.ones(1, 20), pooled, ONE))
    assert counted == joint_work(config, 2 * 4 * 4, 20).forward


def test_a_pass_of_flux_takes_as_many_operations_as_torch_counts() -> None:
    config = flux.CONFIGS["dev"]
    model, shape = FluxModel(config), (1, 16, 1, 8, 12)
    texts = torch.zeros(1, 20, config.text_dim), None, torch.zeros(1, config.pooled_dim)
    counted = _operations_of_blocks(model, lambda: model(torch.zeros(shape), ONE, *texts, ONE))
    assert counted == FAMILIES["flux"].work(config, shape, 20).forward


def test_a_pass_of_hunyuan_image_takes_as_many_operations_as_torch_counts() -> None:
    config = hunyuan_image.CONFIG
    model, shape = HunyuanImageModel(config), (1, config.in_dim, 1, 6, 4)
    texts = torch.zeros(1, 20, config.text_dim), torch.ones(1, 20)
    glyphs = torch.zeros(1, 8, config.glyph_dim), torch.zeros(1, 8)
    counted = _operations_of_blocks(model, lambda: model(torch.zeros(shape).squeeze(2), ONE, *texts, *glyphs))
    assert counted == FAMILIES["hunyuan_image"].work(config, shape, 20).forward


def test_a_section_of_framepack_takes_as_many_operations_as_torch_counts() -> None:
    """All latents that it sees count, padded to whole patches, and the image."""
    config, shape = framepack_dit.CONFIG, (1, 16, 9, 12, 20)
    model, entry = FramePackModel(config), FAMILIES["framepack"]
    drawn = Drawn(torch.Generator().manual_seed(0))
    seen = entry.trained(config, drawn, shape)
    given = {
        name.replace("latents_clean", "clean_latents"): value
        for name, value in seen.items()
        if isinstance(value, torch.Tensor)
    }
    text = torch.zeros(1, 20, config.text_dim), torch.ones(1, 20), torch.zeros(1, config.pooled_dim)

    counted = _operations_of_blocks(model, lambda: model(torch.zeros(shape), ONE, *text, ONE, **given))

    assert counted == entry.work(config, shape, 20).forward
    assert given["image_embeddings"].shape[1] == SIGLIP_TOKENS


def test_a_pass_of_lumina_takes_as_many_operations_as_torch_counts() -> None:
    """Several heads share one of keys and values; refiners are counted apart from the joint layers."""
    config = lumina.CONFIG
    model, shape = LuminaModel(config), (1, 16, 1, 8, 12)
    noisy, caption = torch.zeros(shape).squeeze(2), torch.zeros(1, 20, config.text_dim)

    def call() -> object:
        return model(noisy, ONE, caption, torch.ones(1, 20))

    work: Work = FAMILIES["lumina"].work(config, shape, 20)
    assert work == lumina_work(config, 4 * 6, 20)
    assert _operations_of_blocks(model, call) == work.linear + work.attention
    assert work.outside is not None
    assert _operations_of_blocks(model, call, r"\w+\.\w+_refiner\.\d+") == work.outside.forward


def _operations_of_blocks(
    model: nn.Module, call: Callable[[], object], names: str = r"\w+\.(\w+_)?(blocks|layers)\.\d+"
) -> int:
    """Count with torch; layers that see a single vector are left out: nothing at real sizes."""
    vectors: list[int] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(layer, nn.Linear) and output.numel() == layer.out_features:
            vectors.append(2 * layer.weight.numel())

    inside = [
        layer
        for name, layer in model.named_modules()
        if re.match(names.replace(r"\w+\.", "", 1) + r"\.", name) and isinstance(layer, nn.Linear)
    ]
    hooks = [layer.register_forward_hook(note) for layer in inside]
    counter = FlopCounterMode(display=False)
    # the CPU's own kernel is not known to the counter
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    for hook in hooks:
        hook.remove()
    counts = counter.get_flop_counts()
    blocks = [name for name in counts if re.fullmatch(names, name)]
    return sum(sum(counts[name].values()) for name in blocks) - sum(vectors)


def test_the_figures_of_wan_14b_are_those_of_its_arithmetic() -> None:
    """32,760 tokens: 1.68 PFLOP forward and 6.4 a step with checkpointing."""
    work = wan_work(WAN_14B, 21 * 30 * 52)
    assert round(work.forward / 1e15, 2) == 1.68
    assert round(work.lora_step(checkpointing=True) / 1e15, 1) == 6.4


def test_a_step_without_checkpointing_has_no_recomputation() -> None:
    work = Work(linear=2.0, attention=4.0, cross=1.0)
    assert work.lora_step(checkpointing=True) - work.lora_step(checkpointing=False) == work.forward


def test_the_last_layer_of_a_block_of_wan_is_not_recomputed_in_uncompiled_code() -> None:
    work = wan_work(WAN_14B, 21 * 30 * 52)
    left_out = work.lora_step(checkpointing=True) - work.lora_step(checkpointing=True, ends_early=True)
    assert left_out == 40 * 2 * 21 * 30 * 52 * 5120 * 13824
    assert work.lora_step(checkpointing=False, ends_early=True) == work.lora_step(checkpointing=False)


def test_the_last_layers_of_double_and_single_blocks_are_not_recomputed() -> None:
    """Counted by benchmarks/traffic.py for HunyuanVideo at 960x544x129: 5.1 and 6.4 TFLOP a block."""
    config = HunyuanVideoConfig(3072, 12288, 24, 20, 40, 2, 4096, 16, 16, 4096, 768)
    work = joint_work(config, 33 * 34 * 60, 256)
    assert round(work.last / 1e12) == round(20 * 5.0825 + 40 * 6.3773)


def test_what_is_kept_is_not_recomputed() -> None:
    work = Work(linear=2.0, attention=4.0, cross=1.0, outside=Work(8.0, 16.0))
    whole = work.lora_step(checkpointing=True)
    assert whole - work.lora_step(checkpointing=True, keeps_attention=True) == 4.0
    assert whole - work.lora_step(checkpointing=False) == 7.0  # layers outside of blocks are kept anyway
