"""Guidance by other networks: CLIP and VGG16 score the image predicted at each step, and steer it.

Each step predicts the clean image x0 of its sample x = a x0 + s noise (a and s: square roots of the shares
of data and noise). s x0 + (1 - s) x is decoded and measured by a loss L, and the noise that the U-Net
predicts, after classifier-free guidance, becomes noise + s dL/dx. The gradient goes through the network that
measures, the autoencoder and a pass of the U-Net with the prompt alone.
Sources: Dhariwal and Nichol 2021, arXiv 2105.05233 (algorithm 2); the mixture and CLIP's loss: Crowson's CLIP
guided diffusion, in "CLIP guided Stable Diffusion" of diffusers' community examples; VGG16's loss: that of
content in Gatys et al. 2015, arXiv 1508.06576, as a mean.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from checkpoints.dialects import LoadPlan, load_planned, make_wrong_kind_error
from checkpoints.model_files import find_model_folder
from checkpoints.opening import list_tensor_sources, open_checkpoint
from encoders.clip_checkpoints import ClipNaming, read_clip_text, read_clip_vision
from encoders.clip_layers import ClipText, ClipVision, load_clip_text, load_clip_vision
from generation.denoise import predictor
from modules.errors import CheckpointError, OptionError
from protocols.steps import Guidance, Predict, Section, Step
from stable_diffusion.contract import Model, RequestedImage
from stable_diffusion.network_options import GuideOptions
from stable_diffusion.regions import split_parts
from stable_diffusion.samplers import UnetPasses
from stable_diffusion.starting import read_picture, to_pixels
from stable_diffusion.tokenizers import CHUNK_SIZE, cut_into_chunks, parse_weights

logger = logging.getLogger(__name__)


# VGG16's features of images, with torchvision's weights: convolutions with ReLUs, and pooling layers.
#
# Layers have torchvision's numbers (`features.19` is conv4_2, 20 its ReLU), and all sizes are read off the
# file: where it has no weights, a ReLU follows a convolution and a pooling follows a ReLU. Source: Simonyan
# and Zisserman 2014, arXiv 1409.1556.
OPTION = "--vgg16_guidance_model"
RELEASE = "torchvision's vgg16-397923af.pth"
VGG_REPOSITORY, VGG_FILE = "timm/vgg16.tv_in1k", "model.safetensors"  # weights with the same names
_START = "features."
# statistics of the images it was trained on, RGB in 0..1. Source: torchvision's documentation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# a layer: input and output channels of a convolution, "relu" or "pool"
_Layer = tuple[int, int] | str


class Vgg16(nn.Module):
    """VGG16 up to the layer whose features are compared, for image guidance."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        plain = {"relu": nn.ReLU(inplace=True), "pool": nn.MaxPool2d(2)}
        self.features = nn.Sequential(
            *(
                plain[layer] if isinstance(layer, str) else nn.Conv2d(*layer, kernel_size=3, padding=1)
                for layer in layers
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features, B C h w, in the compute dtype.

        Args:
            pixels: Pixels, B 3 H W in 0..1.
        """
        weight = next(self.features.parameters())
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        return self.features(((pixels - mean) / std).to(weight.device, weight.dtype))


def load_vgg16(path: Path, last_layer: int, device: torch.device, dtype: torch.dtype) -> Vgg16:
    """Load VGG16 up to layer `last_layer`; on the meta device only shapes are checked.

    Raises:
        CheckpointError: If the file is not VGG16.
        OptionError: If the file has no such layer.
    """
    with open_checkpoint(path) as checkpoint:
        # The layers of VGG16 up to index `last_layer`, inferred from the convolutions in the file
        # Indices without a tensor are ReLU after a convolution, and pooling after ReLU.
        channels = 3
        layers: list[_Layer] = []
        for index in range(last_layer + 1):
            info = checkpoint.tensors.get(f"{_START}{index}.weight")
            if info is None and layers:
                layers.append("relu" if isinstance(layers[-1], tuple) else "pool")
                if layers[-2:] == ["pool", "pool"]:  # beyond the last layer of the file
                    raise OptionError(
                        f"--vgg16_guidance_layer {last_layer}: the last layer in {checkpoint.path} is "
                        f"{index - 1}. Use a lower one, or pass {RELEASE} to {OPTION}"
                    )
                continue
            shape = () if info is None else info.shape
            if len(shape) != 4 or shape[1:] != (channels, 3, 3) or not shape[0]:
                raise make_wrong_kind_error(checkpoint, "VGG16", OPTION, RELEASE)
            layers.append((channels, shape[0]))
            channels = shape[0]
        sources = list_tensor_sources(checkpoint)
        needed = {}
        for number in range(last_layer + 1):
            for name in (f"{_START}{number}.weight", f"{_START}{number}.bias"):
                if name in sources:
                    needed[name] = sources[name]
        plan = LoadPlan(layers, checkpoint, needed, ("*",))  # later layers in the file are ignored
        return load_planned(plan, Vgg16, device=device, dtype=dtype, label=OPTION)


CLIP_REPOSITORY = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
CLIP = ClipNaming(
    description="CLIP (guidance)",
    option="--clip_guidance_model",
    release=f"config.json and model.safetensors of a whole CLIP, as of {CLIP_REPOSITORY}",
)
_PROJECTION = "text_projection.weight"  # P C
# minimum square root of the fraction of data: below it, with --zero_terminal_snr, a sample is pure noise
MIN_ALPHA = 0.01

Loss = Callable[[Tensor], Tensor]  # pixels 1 3 H W, in 0..1 -> the loss, scaled


@dataclass(frozen=True, eq=False)
class FullClip:
    """CLIP with its text and image encoder."""

    text: ClipText
    projection: Tensor
    vision: ClipVision

    @torch.no_grad()
    def encode_text(self, ids: Sequence[int]) -> Tensor:
        """Return the CLIP embedding of a text, 1 P.

        Args:
            ids: Token ids of the text, including start and end token.
        """
        tokens = torch.tensor([ids], device=self.text.device)
        return self.text(tokens, torch.tensor([len(ids) - 1], device=self.text.device)) @ self.projection.T


@dataclass(frozen=True, eq=False)
class Guides:
    """CLIP and VGG16 networks that guide images; each image is generated in a batch of its own."""

    options: GuideOptions
    model: Model
    clip: FullClip | None
    vgg: Vgg16 | None

    def steer(self, guidance: Guidance, passes: UnetPasses, request: RequestedImage) -> Guidance:
        """Return guidance that also moves the prediction down the gradient of the CLIP and VGG16 losses.

        Args:
            guidance: Guidance to wrap.
            passes: Runs the U-Net for the predicted image.
            request: The image to steer.

        Raises:
            MediaError: If the guide image cannot be read.
        """
        # The loss whose gradient guides an image: the sum over all guiding networks
        options = self.options
        clip = self.clip
        losses: list[Loss] = []
        if clip is not None and options.clip_guidance_scale:
            vector = clip.encode_text(self._read_clip_tokens(request))
            losses.append(_make_clip_loss(clip, vector, options.clip_guidance_scale))
        if clip is not None and options.clip_image_guidance_scale:
            vector = clip.vision.encode([read_picture(request.guides[0])])
            losses.append(_make_clip_loss(clip, vector, options.clip_image_guidance_scale))
        if self.vgg is not None:
            losses.append(_make_vgg_loss(self.vgg, request.guides[0], options.vgg16_guidance_scale))

        def image_loss(pixels: Tensor) -> Tensor:
            return torch.stack([loss(pixels) for loss in losses]).sum()

        model = self.model
        sampler = passes.sampler
        # gradient checkpointing saves memory; the U-Net cannot use it if its hooks track the running layer
        model.vae.enable_gradient_checkpointing()
        if request.settings.num_parts > 1 or request.settings.deep_shrink is not None:
            model.unet.disable_gradient_checkpointing()
        else:
            model.unet.enable_gradient_checkpointing()

        def guide(step: Step, predict: Predict, section: Section) -> Tensor:
            velocity = guidance(step, predict, section)
            index = sampler.first_index + step.index
            alpha = float(sampler.schedule.alphas[index])  # factor of the clean latents
            if alpha < MIN_ALPHA:  # almost pure noise: the predicted image would be meaningless
                return velocity
            gradient = self._compute_gradient(image_loss, passes, step, section)
            strength = step.sigma
            if model.predicts_velocity:  # v = (noise - sigma * x) / alpha
                strength = step.sigma / alpha
            return velocity + gradient * strength

        return guide

    def _compute_gradient(self, image_loss: Loss, passes: UnetPasses, step: Step, section: Section) -> Tensor:
        """Return the gradient of the predicted image's loss with respect to the noisy latents."""
        model = self.model
        sampler = passes.sampler
        index = sampler.first_index + step.index
        alpha = float(sampler.schedule.alphas[index])
        # samples of some samplers are x / alpha
        scale = float(sampler.model_input(index, torch.ones(1)))
        with torch.enable_grad():
            x = (step.noisy * scale).requires_grad_()
            scaled_step = replace(step, noisy=x / scale)
            predict = predictor(passes, lambda _: model.unet, scaled_step, split=False)
            (prediction,) = predict(section.positive)
            if model.predicts_velocity:
                clean = alpha * x - step.sigma * prediction
            else:
                clean = (x - step.sigma * prediction) / alpha
            # at lower noise levels, the networks see more of the noisy latents themselves
            blended = step.sigma * clean + (1 - step.sigma) * x
            loss = image_loss(_decode(model, blended))
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient

    def _read_clip_tokens(self, request: RequestedImage) -> list[int]:
        """Return CLIP's ids of an image's prompt, without weights, truncated, with start and end token."""
        text = request.clip_prompt
        if text is None:
            text = " ".join(split_parts(request.prompt))
        text_encoder = self.model.text_encoders[0]
        chunks = cut_into_chunks(parse_weights(text), text_encoder.tokenize)
        ids = [token for chunk in chunks for token in chunk.ids][:CHUNK_SIZE]
        return [text_encoder.bos_token_id, *ids, text_encoder.eos_token_id]


def _decode(model: Model, latents: Tensor) -> Tensor:
    """Decode latents, 1 4 1 h w, to pixels, 1 3 H W float32 in 0..1."""
    scaled = (latents.squeeze(2) / model.kind.latent_scale).to(model.vae_dtype)
    return (model.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)


def _make_clip_loss(clip: FullClip, vector: Tensor, scale: float) -> Loss:
    """Return a loss of pixels: half the squared angle of their CLIP embedding to `vector`, times `scale`."""
    # `vector` is a CLIP image embedding, 1 x its width.
    target = normalize(vector.float(), dim=-1)
    weight = clip.vision.visual_projection.weight

    def loss(pixels: Tensor) -> Tensor:
        pixels_vector = clip.vision(clip.vision.prepare_pixels(pixels).to(weight.dtype)).float()
        return scale * (2 * ((normalize(pixels_vector, dim=-1) - target).norm() / 2).arcsin() ** 2)

    return loss


def _make_vgg_loss(vgg: Vgg16, path: Path, scale: float) -> Loss:
    """Return a loss on pixels: the mean squared error of their VGG16 features to a guide image's."""
    guide_image = read_picture(path)
    # by size of the generated image, which Gradual Latent enlarges step by step
    guide_features: dict[torch.Size, Tensor] = {}

    def loss(pixels: Tensor) -> Tensor:
        size = pixels.shape[-2:]
        if size not in guide_features:
            with torch.no_grad():
                guide = to_pixels(guide_image, size[1], size[0]) / 2 + 0.5
                guide_features[size] = vgg(guide.to(pixels.device)).float()
        return scale * mse_loss(vgg(pixels).float(), guide_features[size])

    return loss


def check_guides(options: GuideOptions) -> GuideOptions:
    """Check the networks that guide images by their headers; download those that no option names.

    Returns the options with all paths filled in. Raises CheckpointError, OptionError, or DownloadError if a
    download fails.
    """
    clip = options.clip_guidance_model
    vgg = options.vgg16_guidance_model
    if options.uses_clip:
        clip = clip or find_model_folder(CLIP.option, CLIP_REPOSITORY, ("config.json", "model.safetensors"))
        _check_clip(clip)
    if options.vgg16_guidance_scale:
        vgg = vgg or find_model_folder(OPTION, VGG_REPOSITORY, (VGG_FILE,)) / VGG_FILE
        # loaded on the meta device to check the file without reading weights
        load_vgg16(vgg, options.vgg16_guidance_layer, torch.device("meta"), torch.float32)
    return replace(options, clip_guidance_model=clip, vgg16_guidance_model=vgg)


def _check_clip(path: Path) -> None:
    """Raise CheckpointError unless the headers show a CLIP with both a text and an image encoder."""
    with open_checkpoint(path) as checkpoint:
        width = read_clip_vision(checkpoint, CLIP.option, CLIP.release).config.projection_dim
        dim = read_clip_text(checkpoint, CLIP).config.dim
        projection = checkpoint.tensors.get(_PROJECTION)
        if projection is None or projection.shape != (width, dim):
            raise CheckpointError(
                f"{CLIP.option} {checkpoint.path}: its text projection ({_PROJECTION}, {width} x {dim}) is "
                f"missing or has a different size. Pass {CLIP.release}.",
                checkpoint.path,
            )


def load_guides(options: GuideOptions, model: Model) -> Guides | None:
    """Load the guiding networks given by the options, after `check_guides`; None if there are none."""
    if not options.uses_clip and not options.vgg16_guidance_scale:
        return None
    clip = None
    if options.uses_clip:
        assert options.clip_guidance_model is not None
        # Load the text and the image encoder of a CLIP
        path = options.clip_guidance_model
        device = model.device
        dtype = model.dtype
        vision = load_clip_vision(path, device, dtype=dtype, option=CLIP.option, release=CLIP.release)
        with open_checkpoint(path) as checkpoint:
            projection = checkpoint.read(_PROJECTION).to(device, dtype)
        text = load_clip_text(path, device, dtype, CLIP)
        text_encoder = model.text_encoders[0]
        vocabulary = text.embeddings.token_embedding.num_embeddings
        # start and end tokens have the highest ids of a vocabulary
        if max(text_encoder.bos_token_id, text_encoder.eos_token_id) >= vocabulary:
            raise CheckpointError(
                f"{CLIP.option} {path}: it has fewer tokens than the tokenizer of {model.path}. Pass "
                f"{CLIP.release}.",
                path,
            )
        clip = FullClip(text, projection, vision)
        logger.info("guidance by CLIP: %s", options.clip_guidance_model)
    vgg = None
    if options.vgg16_guidance_scale:
        assert options.vgg16_guidance_model is not None
        last_layer = options.vgg16_guidance_layer
        vgg = load_vgg16(options.vgg16_guidance_model, last_layer, model.device, model.dtype)
        logger.info("guidance by VGG16: %s", options.vgg16_guidance_model)
    return Guides(options, model, clip, vgg)
