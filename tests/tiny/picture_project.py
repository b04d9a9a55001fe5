"""What a user has on disk before training a picture model: models under the names of the pages, pictures."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from encoders.clip_checkpoints import ClipVisionConfig
from encoders.clip_layers import ClipVision
from stable_diffusion.assembling import list_cross_attentions
from tests.flux.making import tiny_control_net
from tests.ltx_2.release import write_lora, write_release, write_upscaler
from tests.sound_media import Track, write_media
from tests.tiny import (
    anima,
    ernie_image,
    fibo_2,
    flux,
    flux_2,
    flux_3,
    guides,
    hidream_o1,
    hunyuan_image,
    hunyuan_vae,
    hunyuan_video_15,
    ideogram4,
    kandinsky,
    krea2,
    lumina,
    minimax_h3,
    moss_image,
    qwen_image,
    qwen_image_21,
    stable_diffusion,
    z_image,
)
from tests.tiny.control_nets import write_control_net, write_lllite
from tests.tiny.dit_files import draw, write_shards
from tests.tiny.framepack import write_siglip
from tests.tiny.hunyuan_encoders import CLIP_DIM, save
from tests.tiny.language_models import qwen3_vl, qwen25_vl, write_model, write_qwen_tokenizer
from tests.tiny.picture_encoders import T5_DIM, write_autoencoder, write_clip_l, write_t5xxl
from tests.tiny.post_upscaling import write_rrdb
from tests.tiny.project import CAPTIONS, moving_square, write_clips, write_image
from tests.tiny.qwen_image_21_vae import write_vae
from tests.tiny.wan_encoders import vae_tensors

SIDE = 64  # pixels of the pictures
H3_FRAMES = 22  # of clips of MiniMax-H3, which have 17n + 5
# captions with parts, for pictures whose captions are shuffled
TAGS = "ohwx cat ||| sitting, {red|blue} chair, window"


def lay_out_flux(folder: Path) -> None:
    """FLUX.1 dev, Chroma and what they need; beside the folder a fine-tuned model."""
    kinds = {"flux1-dev": ("dev", {"pooled_dim": CLIP_DIM}), "Chroma1-HD": ("chroma", {})}
    for seed, (name, (kind, sizes)) in enumerate(kinds.items()):
        state = flux.tiny_state(kind, seed, torch.bfloat16, text_dim=T5_DIM, **sizes)
        flux.write_dit(folder, state, name=name)
    tuned = flux.tiny_state("dev", 5, torch.bfloat16, text_dim=T5_DIM, pooled_dim=CLIP_DIM)
    flux.write_dit(folder.parent, tuned, name="flux1-dev-tuned")
    write_autoencoder(folder / "ae.safetensors")
    write_clip_l(folder).rename(folder / "flux_clip_l.safetensors")
    write_t5xxl(folder)
    tiny_control_net().save_pretrained(folder / "FLUX.1-dev-Controlnet-Canny")


def lay_out_kontext(folder: Path) -> None:
    """FLUX.1 Kontext and what it needs; beside the folder what pictures are made from."""
    lay_out_flux(folder)
    (folder / "flux1-dev.safetensors").rename(folder / "flux1-kontext-dev.safetensors")
    (folder.parent / "before").mkdir()
    for name in ("start", "before/0", "before/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_flux_2(folder: Path) -> None:
    """FLUX.2 klein-base and what it needs; beside the folder what pictures are made from."""
    flux_2.write_dit(folder, flux_2.tiny_state(dtype=torch.bfloat16), name="flux-2-klein-base-4b")
    save(folder / "flux2-vae.safetensors", flux_2.vae_state(dtype=torch.bfloat16))
    qwen = flux_2.write_text_encoder(folder / "qwen_3")
    (qwen / "model.safetensors").rename(folder / "qwen_3_4b.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    (folder.parent / "before").mkdir()
    for name in ("start", "chair", "before/0", "before/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_flux_3(folder: Path) -> None:
    """FLUX 3 base and distilled and what they need; beside the folder what pictures are made from."""
    for is_distilled in (False, True):
        name = "flux-3-image-klein" if is_distilled else "flux-3-image-klein-base"
        state = flux_3.tiny_state(int(is_distilled), torch.bfloat16, is_flow_map=is_distilled)
        flux_3.write_dit(folder, state, name=name)
    save(folder / "flux2-vae.safetensors", flux_2.vae_state(dtype=torch.bfloat16))
    qwen = flux_3.write_text_encoder(folder / "qwen_3_vl")
    (qwen / "model.safetensors").rename(folder / "qwen3vl_4b_bf16.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    (folder.parent / "before").mkdir()
    for name in ("start", "chair", "before/0", "before/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_moss_image(folder: Path) -> None:
    """MOSS-Image, Base and SFT, and what they need; beside the folder what pictures are made from."""
    for seed, release in enumerate(("base", "sft")):
        state = moss_image.tiny_state(seed, torch.bfloat16)
        moss_image.write_dit(folder, state, "comfyui", f"moss_image_{release}_bf16")
    save(folder / "flux2-vae_small.safetensors", moss_image.vae_state())
    qwen = moss_image.write_text_encoder(folder / "qwen_3_5")
    (qwen / "model.safetensors").rename(folder / "qwen3.5_9b_bf16.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    (folder.parent / "before").mkdir()
    for name in ("start", "before/0", "before/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_fibo_2(folder: Path) -> None:
    """Fibo 2.0 dev and edit-turbo, and what they need; beside the folder what pictures are made from."""
    for seed, release in enumerate(("dev", "edit_turbo")):
        state = fibo_2.tiny_state(seed, torch.bfloat16)
        fibo_2.write_dit(folder, state, "comfyui", f"fibo2_{release}_bf16")
    save(folder / "flux2-vae.safetensors", flux_2.vae_state(dtype=torch.bfloat16))
    qwen = fibo_2.write_text_encoder(folder / "qwen_3_vl")
    (qwen / "model.safetensors").rename(folder / "qwen3vl_4b_bf16.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    (folder.parent / "before").mkdir()
    for name in ("start", "mask", "chair", "before/0", "before/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_ideogram4(folder: Path) -> None:
    """Both networks of Ideogram 4, and what they need."""
    folder.mkdir(parents=True, exist_ok=True)
    second = ideogram4.write_second(folder, torch.bfloat16)
    second.rename(folder / "ideogram4_unconditional_fp8_scaled.safetensors")
    first = ideogram4.tiny_state(dtype=torch.bfloat16)
    ideogram4.save(folder / "ideogram4_fp8_scaled.safetensors", first)
    ideogram4.write_dit(folder / "Ideogram-4-bf16-Diffusers", first, "diffusers_sharded")
    save(folder / "flux2-vae.safetensors", flux_2.vae_state(dtype=torch.bfloat16))
    texts = ideogram4.write_text_encoder(folder / "qwen3_vl_8b")
    (texts / "model.safetensors").rename(folder / "qwen3vl_8b_fp8_scaled.safetensors")
    (texts / "config.json").rename(folder / "config.json")


def lay_out_ernie_image(folder: Path) -> None:
    """ERNIE-Image and its Turbo, and what they need."""
    for seed, release in enumerate(("", "-turbo")):
        state = ernie_image.tiny_state(seed, torch.bfloat16)
        ernie_image.write_dit(folder, state, name=f"ernie-image{release}")
    save(folder / "flux2-vae.safetensors", flux_2.vae_state(dtype=torch.bfloat16))
    texts = ernie_image.write_text_encoder(folder / "ministral_3")
    (texts / "model.safetensors").rename(folder / "ministral-3-3b.safetensors")
    (texts / "config.json").rename(folder / "config.json")


def lay_out_hidream_o1(folder: Path) -> None:
    """HiDream-O1-Image and Dev, and their tokenizer."""
    for seed, release in enumerate(("", "_dev")):
        state = hidream_o1.tiny_state(seed, torch.bfloat16)
        hidream_o1.write_dit(folder, state, name=f"hidream_o1_image{release}_bf16")
    hidream_o1.write_tokenizer(folder / "hidream_o1")


def lay_out_hunyuan_image(folder: Path) -> None:
    """HunyuanImage-2.1 and what it needs."""
    hunyuan_image.write_dit(folder, hunyuan_image.tiny_state(dtype=torch.bfloat16))
    hunyuan_image.write_vae(folder / "hunyuan_image_2.1_vae_fp16.safetensors")
    qwen = hunyuan_image.write_qwen(folder / "qwen_2.5_vl")
    (qwen / "model.safetensors").rename(folder / "qwen_2.5_vl_7b.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    save(folder / "byt5_small_glyphxl_fp16.safetensors", hunyuan_image.byt5_state())


def lay_out_hunyuan_video_15(folder: Path) -> None:
    """HunyuanVideo 1.5 for 480p and what it needs; beside the folder clips and a first image."""
    for seed, task in enumerate(("t2v", "i2v")):
        state = hunyuan_video_15.tiny_state(seed, torch.bfloat16)
        hunyuan_video_15.write_dit(folder, state, name=f"hunyuanvideo1.5_480p_{task}")
    hunyuan_video_15.write_vae(folder / "hunyuanvideo15_vae_fp16.safetensors")
    qwen = hunyuan_video_15.write_qwen(folder / "qwen_2.5_vl")
    (qwen / "model.safetensors").rename(folder / "qwen_2.5_vl_7b.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    save(folder / "byt5_small_glyphxl_fp16.safetensors", hunyuan_image.byt5_state())
    write_siglip(folder / "sigclip_vision_patch14_384.safetensors")
    write_clips(folder.parent / "clips", count=2)
    write_image(folder.parent / "start.png", SIDE, SIDE)


def lay_out_kandinsky(folder: Path) -> None:
    """Kandinsky 5, its three sizes but Pro, and what they need; beside the folder clips and a first image."""
    for seed, release in enumerate(("t2v_sft", "t2v_pretrain", "i2v")):
        state = kandinsky.tiny_state("video", seed, torch.bfloat16)
        kandinsky.write_dit(folder, state, name=f"kandinsky5lite_{release}_5s")
    image = kandinsky.tiny_state("image", dtype=torch.bfloat16)
    kandinsky.write_dit(folder, image, name="kandinsky5lite_t2i")
    hunyuan_vae.write_vae(folder / "hunyuan-video-t2v-720p" / "vae" / "pytorch_model.pt")
    write_autoencoder(folder / "ae.safetensors")
    for name, part in (("qwen_2.5_vl", kandinsky.write_qwen), ("clip_l", kandinsky.write_clip)):
        files = part(folder / name)
        target = {"qwen_2.5_vl": "qwen_2.5_vl_7b", "clip_l": "clip_l"}[name]
        (files / "model.safetensors").rename(folder / f"{target}.safetensors")
    (folder / "qwen_2.5_vl" / "config.json").rename(folder / "config.json")
    (folder / "clip_l" / "config.json").unlink()  # CLIP's own file has none beside it
    write_clips(folder.parent / "clips", count=2)
    write_image(folder.parent / "start.png", SIDE, SIDE)


def lay_out_anima(folder: Path) -> None:
    """Anima and what it needs."""
    files = anima.write_tiny_anima(folder / "whole", dtype=torch.bfloat16)
    files.dit.rename(folder / "anima-base-v1.0.safetensors")
    files.vae.rename(folder / "qwen_image_vae.safetensors")
    (files.text_encoder / "model.safetensors").rename(folder / "qwen_3_06b_base.safetensors")
    (files.text_encoder / "config.json").rename(folder / "config.json")
    files.text_encoder.rename(folder / "qwen_3")
    (folder / "whole" / "t5_tokenizer").rename(folder / "t5xxl")


def lay_out_lumina(folder: Path) -> None:
    """Lumina-Image-2.0 and what it needs."""
    lumina.write_dit(folder, lumina.tiny_state(dtype=torch.bfloat16), name="lumina_2_model_bf16")
    write_autoencoder(folder / "ae.safetensors")
    gemma = lumina.write_gemma(folder / "tokenizer")
    (gemma / "model.safetensors").rename(folder / "gemma_2_2b_fp16.safetensors")
    (gemma / "config.json").rename(folder / "config.json")


def lay_out_ltx_2(folder: Path) -> None:
    """LTX-2.3 and what two stages need, and LTX-2.5; beside the folder clips with sound, and references."""
    release = write_release(folder)
    release.checkpoint.rename(folder / "ltx-2.3-22b-dev.safetensors")
    release.gemma.rename(folder / "gemma-3-12b-it-qat-q4_0-unquantized")
    newest = write_release(folder / "2.5", version="2.5")
    newest.checkpoint.rename(folder / "ltx-2.5-22b-dev-transformer-bf16.safetensors")
    newest.gemma.rename(folder / "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors")
    for part, name in (("video vae", "video-vae-conv"), ("audio vae", "audio-vae")):
        path = folder / "2.5" / f"{part}.safetensors"
        path.rename(folder / f"ltx-2.5-{name}-bf16.safetensors")
    for index, caption in enumerate(CAPTIONS[:2]):
        clip = folder.parent / "clips" / f"clip {index}.mp4"
        clip.parent.mkdir(exist_ok=True)
        write_media(clip, Track(at=(0.2,)), frames=9, fps=24)
        clip.with_suffix(".txt").write_text(caption, encoding="utf-8")
        reference = folder.parent / "references" / clip.name
        reference.parent.mkdir(exist_ok=True)
        shutil.copy(clip, reference)
    for name in ("waves", "depth"):
        shutil.copy(clip, folder.parent / f"{name}.mp4")
    write_image(folder.parent / "start.png", SIDE, SIDE)
    write_upscaler(folder / "ltx-2.3-spatial-upscaler-x2-1.1.safetensors", "rational")
    write_lora(folder / "ltx-2.3-22b-distilled-lora-384-1.1.safetensors")


def lay_out_minimax_h3(folder: Path) -> None:
    """MiniMax-H3 and what it needs; beside the folder clips with audio."""
    files = minimax_h3.write_tiny_h3(folder)
    files.video_vae.rename(folder / "minimax_h3_video_vae_fp16.safetensors")
    files.audio_vae.rename(folder / "minimax_h3_audio_vae_fp32.safetensors")
    files.text_encoder.rename(folder / "qwen3vl_32b_minimax_h3_bf16.safetensors")
    files.tokenizer.rename(folder / "minimax_h3_tokenizer")
    for index, caption in enumerate(CAPTIONS[:2]):
        clip = folder.parent / "clips" / f"clip {index}.mp4"
        clip.parent.mkdir(exist_ok=True)
        write_media(clip, Track(at=(0.2,)), frames=H3_FRAMES + 2, fps=24)
        clip.with_suffix(".txt").write_text(caption, encoding="utf-8")


def lay_out_z_image(folder: Path) -> None:
    """Z-Image and what it needs."""
    for seed, name in enumerate(("z_image_bf16", "z_image_turbo_bf16")):
        state = z_image.comfy_state(z_image.tiny_state(seed, dtype=torch.bfloat16))
        z_image.write_dit(folder, state, name=name)
    write_autoencoder(folder / "ae.safetensors")
    qwen = z_image.write_qwen3(folder / "qwen_3")
    (qwen / "model.safetensors").rename(folder / "qwen_3_4b.safetensors")
    (qwen / "config.json").rename(folder / "config.json")
    z_image.write_adapter(folder / "zimage_turbo_training_adapter_v2.safetensors")


def lay_out_krea2(folder: Path) -> None:
    """Krea 2, raw and Turbo, and what they need; beside the folder prompts for samples, and references."""
    for seed, name in enumerate(("raw", "turbo")):
        krea2.write_dit(folder, krea2.tiny_state(seed, torch.bfloat16), name=name)
    files = krea2.write_tiny_krea2(folder / "whole")
    files.vae.rename(folder / "qwen_image_vae.safetensors")
    (files.text_encoder / "model.safetensors").rename(folder / "qwen3vl_4b_bf16.safetensors")
    (files.text_encoder / "config.json").rename(folder / "config.json")  # tells how the tiny tower is cut up
    files.text_encoder.rename(folder / "qwen_3_vl")
    (folder.parent / "samples.txt").write_text("a cat --w 32 --h 32 --d 1 --s 1", encoding="utf-8")
    (folder.parent / "control").mkdir()
    for name in ("start", "control/0", "control/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_qwen_image_21(folder: Path) -> None:
    """Qwen-Image-2.1, Turbo and what they need; next to the folder pictures to edit."""
    qwen_image_21.write_dit(
        folder, qwen_image_21.tiny_state(dtype=torch.bfloat16), name="qwen_image_2.1_bf16"
    )
    turbo = folder / "Qwen-Image-2.1-Turbo"
    write_shards(turbo, qwen_image_21.tiny_state(1, torch.bfloat16), "diffusion_pytorch_model")
    write_vae(folder / "qwen_image_2.1_vae_bf16.safetensors")
    write_qwen_tokenizer(folder / "qwen_3_vl")
    write_model(folder / "qwen3vl_8b_bf16.safetensors", qwen3_vl())
    (folder.parent / "control").mkdir()
    for name in ("start", "control/0", "control/1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_qwen_image(folder: Path) -> None:
    """Qwen-Image, Edit-2511, Layered and what they need; beside the folder images to edit, and a mask."""
    for seed, name in enumerate(("qwen_image_bf16", "qwen_image_edit_2511_bf16")):
        qwen_image.write_dit(folder, qwen_image.tiny_state(seed, torch.bfloat16), name=name)
    layered = qwen_image.tiny_state(2, torch.bfloat16, has_layers=True)
    qwen_image.write_dit(folder, layered, name="qwen_image_layered_bf16")
    save(folder / "qwen_image_vae.safetensors", vae_tensors())
    save(folder / "qwen_image_layered_vae.safetensors", vae_tensors(colors=4))
    write_qwen_tokenizer(folder / "qwen_2.5_vl")
    write_model(folder / "qwen_2.5_vl_7b.safetensors", qwen25_vl())
    (folder.parent / "control").mkdir()
    for name in ("start", "scarf", "mask", "control/0", "control/1_0", "control/1_1"):
        write_image(folder.parent / f"{name}.png", SIDE, SIDE)


def lay_out_sdxl(folder: Path) -> None:
    """Stable Diffusion XL, the VAE that works in float16, the tokenizer; beside the folder LoRAs."""
    stable_diffusion.write_sdxl(folder, "sd_xl_base_1.0.safetensors")
    save(folder / "sdxl_vae.safetensors", stable_diffusion.ldm_vae(stable_diffusion.vae_state()))
    stable_diffusion.write_tokenizer(folder / "clip_l")
    for seed, name in enumerate(("style", "cat", "dog")):
        save(folder.parent / "loras" / f"{name}.safetensors", _sdxl_lora(seed))


def lay_out_stable_diffusion(folder: Path) -> None:
    """Stable Diffusion 1.5, 2.1 and XL and all that acts on them; beside the folder what the pages name."""
    lay_out_sdxl(folder)
    stable_diffusion.write_sd1(folder, name="v1-5-pruned-emaonly.safetensors")
    stable_diffusion.write_sd2(folder, name="v2-1_768-ema-pruned.safetensors")
    shutil.copy(folder / "sdxl_vae.safetensors", folder / "vae-ft-mse-840000-ema-pruned.safetensors")
    _write_image_tower(folder / "image_encoder")
    guides.write_clip(folder / "CLIP-ViT-B-32-laion2B-s34B-b79K")
    guides.write_vgg16(folder / "vgg16.tv_in1k.safetensors")
    (folder / "upscalers").mkdir()
    write_rrdb(folder / "upscalers" / "RealESRGAN_x4plus.pth")
    beside = folder.parent
    (beside / "controls").mkdir()
    write_control_net(beside / "controls" / "canny.safetensors", "sd1")
    write_lllite(beside / "controls" / "lllite.safetensors")
    generator = torch.Generator().manual_seed(3)
    size = (2, stable_diffusion.TEXT_DIM)
    vectors = {name: torch.randn(size, generator=generator) for name in ("clip_l", "clip_g")}
    save(beside / "embeddings" / "ohwx.safetensors", vectors)
    layers = list_cross_attentions(stable_diffusion.unet_state("sd1"))
    rows = {name: torch.randn(size, generator=generator) for name in layers}
    save(beside / "embeddings" / "zwx.safetensors", rows)
    for name in ("photo", "sketch"):
        write_image(beside / f"{name}.png", SIDE, SIDE)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    mask.save(beside / "mask.png")
    regions = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    ImageDraw.Draw(regions).rectangle((SIDE // 2, 0, SIDE, SIDE), fill=(0, 255, 0))
    regions.save(beside / "regions.png")


def _write_image_tower(folder: Path) -> None:
    """The image tower of OpenCLIP's bigG, but for the widths."""
    tower = ClipVision(ClipVisionConfig(64, 96, 4, 2, 28, 14, stable_diffusion.TEXT_DIM))
    generator = torch.Generator().manual_seed(4)
    state = {name: draw(name, tuple(tensor.shape), generator) for name, tensor in tower.state_dict().items()}
    save(folder / "model.safetensors", {_in_release(name): tensor for name, tensor in state.items()})
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")


def _in_release(name: str) -> str:
    return name if name.startswith("visual_projection.") else f"vision_model.{name}"


def _sdxl_lora(seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of the attention of the tiny XL U-Net and of both text encoders, as sd-scripts names them."""
    parts = {"lora_unet": stable_diffusion.unet_state("sdxl")}
    parts |= {f"lora_te{number + 1}": stable_diffusion.text_state("sdxl", number) for number in range(2)}
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for start, state in parts.items():
        for name, weight in state.items():
            if name.endswith(("to_q.weight", "to_v.weight", "q_proj.weight")):
                key = f"{start}_{name.removesuffix('.weight').replace('.', '_')}"
                rows, columns = weight.shape
                lora[f"{key}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
                lora[f"{key}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
                lora[f"{key}.alpha"] = torch.tensor(float(rank))
    return lora


def lay_out_images(folder: Path) -> None:
    """Pictures with captions, others to regularize with, masks, and the same in the forms of the guides."""
    for name in ("pictures", "regularization", "masks", "edges", "train/2_ohwx cat", "reg/1_cat"):
        (folder / name).mkdir(parents=True)
    for index in range(2):
        image = folder / "pictures" / f"{index}.png"
        Image.fromarray(moving_square(1, SIDE + 16 * index, SIDE, index)[0]).save(image)
        image.with_suffix(".txt").write_text(CAPTIONS[index], encoding="utf-8")
        for other in ("masks", "edges", "train/2_ohwx cat"):
            shutil.copy(image, folder / other / image.name)
    (folder / "train/2_ohwx cat/0.txt").write_text(TAGS, encoding="utf-8")
    for other in ("regularization", "reg/1_cat"):
        write_image(folder / other / "cat.png", SIDE, SIDE)
    metadata = {"0": {"caption": "a cat", "tags": "red, chair"}, "1.png": {"caption": "a dog"}}
    (folder / "captions.json").write_text(json.dumps(metadata), encoding="utf-8")
    write_image(folder / "start.png", SIDE, SIDE)
