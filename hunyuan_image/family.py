"""HunyuanImage-2.1, described for the shared loops."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.pictures import NO_MOMENTS, ModelOfPictures, check_pictures
from encoders.tiles import posterior_generator
from hunyuan_image.checkpoints import load_dit
from hunyuan_image.configs import DIT, HUNYUAN_IMAGE, LATENT, NOISE
from hunyuan_image.files import HunyuanImageFiles
from hunyuan_image.options import (
    AS_RELEASED,
    NAME,
    HunyuanImageGenerationOptions,
    HunyuanImageLatentCachingOptions,
    HunyuanImageTextCachingOptions,
    HunyuanImageTrainingOptions,
    ProjectedGuidanceOptions,
)
from hunyuan_image.text_encoders import GlyphTextEncoder, QwenTextEncoder, find_quoted
from modules.checkpoints.dits import choose_dtype, with_dtype
from modules.contract.data import (
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    MediaTable,
    MomentsRules,
    SamplingDefaults,
    name_texts,
)
from modules.contract.family import DitSpec, Family, NoiseSource, NoiseSpec, TextEncoder
from modules.contract.loading import Placement
from modules.contract.requests import (
    NO_MEDIA,
    Prepared,
    Request,
    check_size,
    keep_usable_media,
    settle,
    size_of,
    whole_patches,
)
from modules.contract.rules import (
    IMAGE,
    LATENTS,
    ONE_EXPERT,
    Expert,
    GuidanceRules,
    ModelRelease,
    Projection,
    SourceRules,
)
from modules.contract.steps import NO_TWEAKS, EncodedPrompts, Section, Tweaks
from modules.devices import choose_compute_dtype
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS

TEXT_KEYS = QwenTextEncoder.keys | GlyphTextEncoder.keys
# argument of the network -> name in caches
TEXT_INPUTS = {
    "text": "vlm_embed",
    "text_mask": "vlm_mask",
    "glyphs": "byt5_embed",
    "glyph_mask": "byt5_mask",
}
FLOW_SHIFT = 5.0  # where nothing is said
GENERATION = SamplingDefaults(
    steps=50,
    fps=1.0,
    guidance_scale=3.5,
    embedded_guidance=None,
    flow_shift=FLOW_SHIFT,
    solver="euler",
    width=2048,
    height=2048,
    frames=1,
    noise_on_cpu=True,
)
SAMPLES = replace(GENERATION, steps=20, width=512, height=512)
# of adaptive projected guidance, as released
APG_SCALE, APG_MOMENTUM, APG_NORM = 10.0, -0.5, 10.0


@dataclass(frozen=True)
class HunyuanImage(ModelOfPictures):
    """Description of HunyuanImage-2.1 for one run, built by the `family_for_...` functions below."""

    files: HunyuanImageFiles
    projection: ProjectedGuidanceOptions = AS_RELEASED
    defaults: SamplingDefaults = GENERATION
    options: Any = NO_OPTIONS  # of a training

    name: str = field(default="hunyuan_image", init=False)
    cache_tag: str = field(default="hi", init=False)
    lora_module: str = field(default="networks.lora_hunyuan_image", init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=HUNYUAN_IMAGE, init=False)
    text_keys: frozenset[str] = field(default=TEXT_KEYS, init=False)
    experts: tuple[Expert, ...] = field(default=ONE_EXPERT, init=False)
    moments: MomentsRules = field(default=NO_MOMENTS, init=False)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Name of this model in saved files."""
        names = {"sd_model_name": self.files.dit, "vae_name": self.files.vae}
        return {
            "architecture": "hunyuan-image-2.1",
            "implementation": "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
            "model_type": "hunyuan_image",
            "base_model_version": "hunyuan-image-2.1",
            **{key: path.name for key, path in names.items() if path is not None},
        }

    # encoding

    def check_given_files(self) -> None:
        """Check every file that an option names, needed or not. Loads nothing."""
        self.files.check()

    def text_encoders(self) -> Sequence[TextEncoder]:
        """Return Qwen2.5-VL's language model and the encoder of letters; files are opened when loaded."""
        return [self.files.qwen(), self.files.glyphs()]

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Encoder and switches that cached latents depend on."""
        return self.files.vae_identity()

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        """Return the VAE."""
        return MediaEncoders(self.files.load_vae(device))

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has clips or control images."""
        check_pictures(table, NAME)

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """Path of the transformer's checkpoint."""
        return (self.files.dit_path,)

    def block_counts(self) -> tuple[int, ...]:
        """Return the numbers of double and of single blocks; the file's header says them."""
        config = self.files.dit_header().config
        return config.double_blocks, config.single_blocks

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        """Return the dtype that the transformer computes in without autocast; its file is not loaded."""
        return choose_dtype(self.files.dit_header().block_dtype, with_dtype(placement, self.files.dit_dtype))

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer. --dit_dtype applies if the caller sets no dtype."""
        return load_dit(self.files.dit_path, with_dtype(placement, self.files.dit_dtype))

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the conditions for training: states and masks of both texts."""
        remedy = "hunyuan_image_cache_text_encoder_outputs.py"
        batch.check(dict.fromkeys(sorted(TEXT_INPUTS.values()), remedy), "the transformer")
        config = self.files.dit_header().config
        widths = {"vlm_embed": config.text_dim, "byt5_embed": config.glyph_dim}
        batch.check_widths(widths, self.files.dit_path, f"{remedy} and the text encoders of {NAME}")
        return {name: batch.tensors[name] for name in TEXT_INPUTS.values()}

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        """Predict the velocity, B C 1 H W in float32. The network was trained with whole timesteps.

        cond: vlm_embed T D and vlm_mask T of each sample, byt5_embed B G E, byt5_mask B G.
        """
        velocity = dit(
            noisy.squeeze(2),
            timesteps.float().trunc(),
            **name_texts(cond, TEXT_INPUTS, noisy.device),
            tweaks=tweaks.rename_away(lambda text: name_texts(text, TEXT_INPUTS, noisy.device)),
        )
        return velocity.unsqueeze(2)

    # generation

    def check_files(self, media: bool) -> None:
        """Check the files that every generation needs. media: also that of the VAE.

        Raises OptionError if one is not given, CheckpointError if it is missing or of another kind.
        """
        self.files.check(("dit", "texts", *(("vae",) if media else ())))

    def prepare(self, request: Request) -> Prepared:
        """Fill open fields of the request, cut the size to whole latents, check files. Nothing is loaded.

        Raises OptionError if a size cannot be made, CheckpointError if a file is missing or of another kind.
        """
        self.files.check()
        request = keep_usable_media(request, NO_MEDIA, f"{NAME} does not take it")
        width, height, _ = size_of(request, self.defaults)
        size = *whole_patches(width, height, LATENT), 1
        check_size(size, LATENT)
        shift = FLOW_SHIFT if request.flow_shift is None else request.flow_shift
        prepared = settle(request, self.defaults, size, shift, "")
        rules = GuidanceRules(projection=self._projection(bool(find_quoted(request.prompt))))
        return replace(prepared, rules=rules)

    def _projection(self, has_letters: bool) -> Projection:
        """Return the rule of guidance; a picture with letters keeps the plain formula for longer."""
        options = self.projection
        return Projection(
            options.apg_start_step_ocr if has_letters else options.apg_start_step_general,
            APG_SCALE,
            APG_MOMENTUM,
            APG_NORM,
            rescale=options.guidance_rescale_apg,
        )

    @property
    def source(self) -> SourceRules:
        """Return the rules for starts of denoising."""
        return SourceRules((IMAGE, LATENTS), NAME, False, frozenset({"hunyuan_image"}))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode a picture, 1 1 H W 3 uint8, as a posterior sample in model space, 1 C 1 h w."""
        return encoders.vae.encode(byte_clips(frames), [posterior_generator(seed)]) * LATENT.scale

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the one section for the denoising loop. Noise is drawn in bfloat16, as released."""
        drawn = noise.draw(LATENT.shape(1, prepared.height, prepared.width), torch.bfloat16)
        return (yield prompts[0].section(drawn.float(), inputs.get(0)))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Decode to pixels B 3 1 H W in -1..1."""
        yield from encoders.vae.decode(latents / LATENT.scale)


def family_for_latent_caching(options: HunyuanImageLatentCachingOptions) -> HunyuanImage:
    """Describe the family for hunyuan_image_cache_latents.py."""
    return HunyuanImage(HunyuanImageFiles().add_vae(options.vae))


def family_for_text_caching(options: HunyuanImageTextCachingOptions) -> HunyuanImage:
    """Describe the family for hunyuan_image_cache_text_encoder_outputs.py."""
    return HunyuanImage(HunyuanImageFiles().add_text(options.text))


def family_for_training(options: HunyuanImageTrainingOptions) -> HunyuanImage:
    """Describe the family for hunyuan_image_train_network.py."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    files = HunyuanImageFiles(options.dit, dtype, "--pretrained_model_name_or_path")
    files = files.add_vae(options.vae).add_text(options.text)
    return HunyuanImage(files, defaults=SAMPLES, options=options)


def family_for_generation(options: HunyuanImageGenerationOptions) -> HunyuanImage:
    """Describe the family for hunyuan_image_generate_image.py."""
    dtype = choose_compute_dtype(options.dit_dtype, "--dit_dtype", None)
    files = HunyuanImageFiles(options.dit, dtype).add_vae(options.vae).add_text(options.text)
    return HunyuanImage(files, options.projection)


_: type[Family] = HunyuanImage
