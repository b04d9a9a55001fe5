"""Check that Qwen-Image's caches were made for the release that is trained."""

from collections.abc import Collection

from modules.errors import CacheError
from protocols.data import LATENTS_PART, Batch
from qwen_image.files import KEY, VERSIONS, QwenImageFiles, Version

TEXTS_AGAIN = "qwen_image_cache_text_encoder_outputs.py"
LATENTS_AGAIN = "qwen_image_cache_latents.py"
PIXELS = {"pixels": "-1..1"}  # the input of the VAE, in records of caches


def check_batch(batch: Batch, version: Version, files: QwenImageFiles) -> None:
    """Raise CacheError for texts of another release, and for latents of another range of pixel values."""
    batch.check({KEY: TEXTS_AGAIN}, "the transformer")
    width = files.dit_header().config.text_dim
    batch.check_widths({KEY: width}, files.dit_path, f"{TEXTS_AGAIN} and Qwen2.5-VL (7B)")
    for cache in batch.cache_origins:
        # Raise CacheError if the cache was made for another release, or from pixels in the wrong range
        # Caches of other programs do not record the release, and are accepted.
        has_pixel_range = PIXELS.items() <= cache.encoder.items()
        if cache.part == LATENTS_PART and not has_pixel_range:
            raise CacheError(
                f"{cache.path}: an earlier version encoded these latents from pixels in the wrong range. "
                f"Cache again with {LATENTS_AGAIN}: it replaces them."
            )
        use = version.encoder_settings
        fingerprint = cache.encoder.get(use.template_key, use.fingerprint)
        if cache.part == use.name and fingerprint != use.fingerprint:
            raise CacheError(
                f"{cache.path}: the caption was encoded for {_name_models_with(fingerprint)}, this training "
                f"is of {version.display_name}. Pass the same --model_version to {TEXTS_AGAIN} and to the "
                "training."
            )


def _name_models_with(fingerprint: str) -> str:
    """Return the names of the models that use a text encoder with this fingerprint."""
    versions: Collection[Version] = VERSIONS.values()
    names = [
        version.display_name for version in versions if version.encoder_settings.fingerprint == fingerprint
    ]
    return " or ".join(names) or "another model"
