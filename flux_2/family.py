"""FLUX.2 dev and klein, described for the shared loops."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders import pictures
from flux_2.configs import DIT, LATENT, NOISE, count_latents
from flux_2.files import Flux2Files, make_model_files
from flux_2.names import LORA
from flux_2.options import (
    NAME,
    Flux2GenerationOptions,
    Flux2LatentCachingOptions,
    Flux2TextCachingOptions,
    Flux2TrainingOptions,
)
from flux_2.versions import DEV, TEXT_STATES_KEY, VERSIONS
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from protocols.data import (
    CONTROL,
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    SamplingDefaults,
    name_texts,
)
from protocols.families import list_same_latents
from protocols.family import DitSpec, Family, NoiseSpec
from protocols.few_steps import GUIDED, FewSteps, make_transfer_target
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, Overrides

logger = logging.getLogger(__name__)

LATENT_CACHING_SCRIPT, TEXT_CACHING_SCRIPT = "flux_2_cache_latents.py", "flux_2_cache_text_encoder_outputs.py"
MAX_REFERENCES = 10  # as released
# pixels of a reference, in area: of one alone, and of each of several. Source: the released code
ALONE, AMONG_SEVERAL = 2024**2, 1024**2


@dataclass(frozen=True)
class Flux2(pictures.ImageModelFamily):
    """Description of FLUX.2 for one run, built by the `family_for_...` functions below.

    Files do not distinguish klein from klein-base: --model_version does.
    """

    files: Flux2Files
    trained_guidance: float = 1.0  # what training feeds the guidance input of dev
    resizes_references: bool = True  # large ones are reduced; else each keeps its size
    options: Any = NO_OPTIONS  # set only in training

    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    text_keys: frozenset[str] = field(default=frozenset({TEXT_STATES_KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps(
        base="klein-base-4b or klein-base-9b (with its file)",
        also="klein",
        targets=(GUIDED, make_transfer_target("klein-base", "flux-2-klein-base.safetensors")),
        distilled_words="klein",
        undistilled_pattern="base",
    )

    def few_steps_evidence(self) -> str | None:
        """Return why the transformer counts as distilled klein (release or file name), or None."""
        version = self.files.version
        if version.is_distilled and version.defaults.embedded_guidance is None:
            return f"--model_version says {version.release.repositories[0]}"
        return super().few_steps_evidence()

    @property
    def name(self) -> str:
        """Name of the architecture in caches and saved files, which depends on the release."""
        return self.files.version.name

    @property
    def same_latents(self) -> frozenset[str]:
        """Return the names of FLUX.2's releases and of other families that use its autoencoder."""
        return frozenset(version.name for version in VERSIONS.values()) | list_same_latents("flux_2")

    @property
    def cache_tag(self) -> str:
        """Return the suffix of cache file names, which depends on the release."""
        return self.files.version.cache_tag

    @property
    def release(self) -> ModelRelease:
        """Repository and license of the released model."""
        return self.files.version.release

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the release's default size, steps and guidance."""
        return self.files.version.defaults

    @property
    def references(self) -> ReferenceRules:
        """Return how many reference images the model takes, and which networks use them."""
        return ReferenceRules(max_references=MAX_REFERENCES)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata, with the architecture of the release."""
        version = self.files.version
        names = {
            "architecture": version.architecture,
            "implementation": "https://github.com/black-forest-labs/flux2",
            "model_type": version.name,
        }
        return self.add_file_names(names)

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return a batch's conditions: text, guidance (B) and references."""
        batch.check({TEXT_STATES_KEY: TEXT_CACHING_SCRIPT}, "the transformer")
        config, use = self.files.dit_header().config, self.files.version.encoder_settings
        remedy = (
            f"{TEXT_CACHING_SCRIPT} --model_version {self.files.model_version} and {use.model.description}"
        )
        batch.check_widths({TEXT_STATES_KEY: config.text_dim}, self.files.dit_path, remedy)
        conditions: dict[str, Tensor | list[Tensor]] = {TEXT_STATES_KEY: batch.tensor(TEXT_STATES_KEY)}
        if config.has_guidance:
            conditions[pictures.GUIDANCE] = torch.full((len(latents),), self.trained_guidance)
        return conditions | pictures.get_references(batch, LATENT.channels, 1, LATENT_CACHING_SCRIPT)

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        `cond` contains:
            ctx_vec: States of the language model, B T D.
            guidance: B, only for the release dev.
            latents_control_0, ...: Clean latents of references, B C 1 h w each, if there are any.
        """
        device = noisy.device
        name_inputs = partial(name_texts, names={"text": TEXT_STATES_KEY}, device=device)
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_inputs(cond),
            guidance=pictures.guidance_in(cond, device),
            overrides=overrides.rename_nag(name_inputs),
            references=pictures.references_in(cond, device),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Fill in a request's unset fields; the default flow shift follows from image size and steps."""
        request = self._drop_unused_guidance(request)
        prepared = self.resolve_image(request, 1.0, "")
        if request.flow_shift is not None:
            return prepared
        # the released schedule in place of a flow shift
        tokens = count_latents(LATENT.shape(1, prepared.height, prepared.width))
        return replace(prepared, flow_shift=math.exp(empirical_mu(tokens, prepared.steps)))

    def _drop_unused_guidance(self, request: Request) -> Request:
        """Drop the guidance scale if the release is distilled; warn about each guidance that is ignored."""
        version = self.files.version
        has_embedded_guidance = version.defaults.embedded_guidance is not None
        default = DEV.defaults.embedded_guidance  # the script's default, which is the same for all releases
        if not has_embedded_guidance and request.embedded_guidance not in (None, default):
            logger.warning(
                "the embedded guidance %g (--embedded_cfg_scale) is ignored: --model_version %s has no input "
                "for it",
                request.embedded_guidance,
                self.files.model_version,
            )
        if not version.is_distilled or request.guidance_scale in (None, 1.0):
            return request
        logger.warning(
            "the guidance scale %g is ignored: --model_version %s is distilled, so its guidance is %s",
            request.guidance_scale,
            self.files.model_version,
            "--embedded_cfg_scale" if has_embedded_guidance else "built in",
        )
        return replace(request, guidance_scale=None)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the references as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        paths = prepared.request.control_images
        area = None  # each keeps its size
        if self.resizes_references:
            area = ALONE if len(paths) == 1 else AMONG_SEVERAL
        return {
            0: {
                f"{CONTROL}_{number}": encoders.vae.encode(
                    byte_clips(pictures.read_reference(path, area, LATENT.pixel_step))
                )
                for number, path in enumerate(paths)
            }
        }


def empirical_mu(tokens: int, steps: int) -> float:
    """Return mu of the noise levels for an image of this many tokens; their shift is e^mu.

    It is interpolated linearly between the values for 10 and for 200 steps. Source: the released code of
    FLUX.2.
    """
    mu_at_200_steps = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return mu_at_200_steps
    mu_at_10_steps = 8.73809524e-05 * tokens + 1.89833333
    slope = (mu_at_200_steps - mu_at_10_steps) / 190
    return slope * steps + mu_at_200_steps - 200 * slope


def family_for_latent_caching(options: Flux2LatentCachingOptions) -> Flux2:
    """Build the model description for flux_2_cache_latents.py, which needs only the VAE."""
    return Flux2(Flux2Files(model_version=options.model_version).add_vae(options.vae.file))


def family_for_text_caching(options: Flux2TextCachingOptions) -> Flux2:
    """Build the model description for flux_2_cache_text_encoder_outputs.py: only the text encoder."""
    return Flux2(Flux2Files(model_version=options.model_version).add_text(options.text))


def family_for_training(options: Flux2TrainingOptions) -> Flux2:
    """Build the model description for flux_2_train_network.py."""
    return Flux2(
        make_model_files(options),
        trained_guidance=options.embedded_guidance,
        resizes_references=not options.no_resize_control,
        options=options,
    )


def family_for_generation(options: Flux2GenerationOptions) -> Flux2:
    """Build the model description for flux_2_generate_image.py."""
    return Flux2(make_model_files(options), resizes_references=not options.no_resize_control)


_: type[Family] = Flux2
