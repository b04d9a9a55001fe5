"""The releases of FLUX.2: names in caches and LoRAs, text encoder, and settings of a generation, as data."""

from dataclasses import dataclass, replace

from checkpoints.tokenizers import TokenizerFiles
from encoders.language_encoder import LanguageEncoderSettings, qwen3_chat, qwen_tokenizer
from encoders.language_models import QWEN3, LanguageModel
from encoders.pictures import image_defaults
from encoders.text_encoder import TokenizerSource
from protocols.data import SamplingDefaults
from protocols.rules import ModelRelease

MISTRAL3 = LanguageModel(
    description="the language model of Mistral Small 3",
    option="--text_encoder",
    files="mistral_3_small_flux2_bf16.safetensors of Comfy-Org, or the folder text_encoder of FLUX.2-dev",
    class_prefix="Mistral",
    kind="mistral",
    word_key="mistral3_24b",
    defaults={"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    theta=1e9,
    eps=1e-5,
    settings={"sliding_window": None},
)
TEXT_STATES_KEY = "ctx_vec"
DIT_OPTION = "--text_encoder_tokenizer"
TOKENS = 512  # length of a text with its template; the transformer attends to the padding too
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
_BEFORE, _AFTER = qwen3_chat(thinks=False)
_MISTRAL_FILES = TokenizerFiles(
    option=DIT_OPTION,
    names=("tokenizer.json",),
    folder="tokenizer",
    repository="black-forest-labs/FLUX.2-dev",
    # inside the encoder's folder; next to a single file; next to text_encoder (diffusers)
    folders=(".", "mistral_3", "tokenizer", "../tokenizer"),
    unique_token="[INST]",
)
MISTRAL_USE = LanguageEncoderSettings(
    name="m3",
    states_key=TEXT_STATES_KEY,
    model=MISTRAL3,
    source=TokenizerSource(_MISTRAL_FILES, adds_own=False),
    max_length=TOKENS,
    template_prefix=f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST]",
    template_suffix="[/INST]",
    states=(10, 20, 30),
    pad_token="<pad>",
    pads_left=True,
    batch_size=1,
)
QWEN3_4B_USE = LanguageEncoderSettings(
    name="qwen3",
    states_key=TEXT_STATES_KEY,
    model=QWEN3,
    source=qwen_tokenizer(DIT_OPTION, "black-forest-labs/FLUX.2-klein-4B"),
    max_length=TOKENS,
    template_prefix=_BEFORE,
    template_suffix=_AFTER,
    states=(9, 18, 27),
    pad_token="<|endoftext|>",
    batch_size=1,  # so that a state does not depend on other prompts, to the last bit
)
QWEN3_8B_USE = replace(
    QWEN3_4B_USE,
    model=replace(
        QWEN3,
        files="qwen_3_8b.safetensors of Comfy-Org, or the folder of Qwen/Qwen3-8B,",
        word_key="qwen3_8b",
    ),
    source=qwen_tokenizer(DIT_OPTION, "black-forest-labs/FLUX.2-klein-9B"),
)


# default guidance: an input of dev; with klein-base, classifier-free guidance by a second pass
GUIDANCE = 4.0
_HUB = "https://huggingface.co/black-forest-labs/{}/blob/main/LICENSE.md"
_DEV_LICENSE = ("FLUX [dev] Non-Commercial License", "other", _HUB.format("FLUX.2-dev"))
_KLEIN_9B_LICENSE = ("FLUX Non-Commercial License", "other", _HUB.format("FLUX.2-klein-9B"))
_APACHE = ("Apache-2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")


@dataclass(frozen=True)
class Flux2Version:
    """Properties of a FLUX.2 release that its tensors do not show."""

    cache_tag: str
    name: str  # in caches, samples and LoRAs
    architecture: str  # modelspec.architecture
    encoder_settings: LanguageEncoderSettings
    release: ModelRelease
    defaults: SamplingDefaults
    dim: int  # width of the released transformer
    text_dim: int  # width of text states
    is_distilled: bool  # guidance by a second pass does not belong to it


def _release(name: str, licence: tuple[str, str, str]) -> ModelRelease:
    return ModelRelease((f"black-forest-labs/{name}",), *licence)


DEV = Flux2Version(
    cache_tag="f2d",
    name="flux_2_dev",
    architecture="Flux.2-dev",
    encoder_settings=MISTRAL_USE,
    release=_release("FLUX.2-dev", _DEV_LICENSE),
    defaults=image_defaults(50, 1.0, 1024, embedded_guidance=GUIDANCE),
    dim=6144,
    text_dim=15360,
    is_distilled=True,
)
KLEIN_4B = Flux2Version(
    cache_tag="f2k4b",
    name="flux_2_klein_4b",
    architecture="Flux.2-klein-4b",
    encoder_settings=QWEN3_4B_USE,
    release=_release("FLUX.2-klein-4B", _APACHE),
    defaults=image_defaults(4, 1.0, 1024),
    dim=3072,
    text_dim=7680,
    is_distilled=True,
)
KLEIN_9B = replace(
    KLEIN_4B,
    cache_tag="f2k9b",
    name="flux_2_klein_9b",
    architecture="Flux.2-klein-9b",
    encoder_settings=QWEN3_8B_USE,
    release=_release("FLUX.2-klein-9B", _KLEIN_9B_LICENSE),
    dim=4096,
    text_dim=12288,
)
BASE = image_defaults(50, GUIDANCE, 1024)
VERSIONS = {
    "klein-4b": KLEIN_4B,
    "klein-base-4b": replace(
        KLEIN_4B, release=_release("FLUX.2-klein-base-4B", _APACHE), defaults=BASE, is_distilled=False
    ),
    "klein-9b": KLEIN_9B,
    "klein-base-9b": replace(
        KLEIN_9B,
        release=_release("FLUX.2-klein-base-9B", _KLEIN_9B_LICENSE),
        defaults=BASE,
        is_distilled=False,
    ),
    "dev": DEV,
}
