"""Messages on attention name the option of a family's script that was typed."""

import argparse

from hunyuan_image.options import translate_training as translate_hunyuan_image
from lumina.options import translate_training as translate_lumina

FLASH = {"flash_attn": False, "ae": None, "vae": None}


def test_another_spelling_of_flash_attention_is_what_messages_name() -> None:
    lumina = argparse.Namespace(**FLASH, use_flash_attn=True, use_sage_attn=False)
    translate_lumina(lumina)
    assert (lumina.flash_attn, lumina.typed_names) == (True, {"--flash_attn": "--use_flash_attn"})

    switches = {"network_train_text_encoder_only": False, "network_train_unet_only": True}
    image = argparse.Namespace(**FLASH, attn_mode="flash", **switches)
    translate_hunyuan_image(image)
    assert (image.flash_attn, image.typed_names) == (True, {"--flash_attn": "--attn_mode flash"})


def test_the_usual_spelling_stays() -> None:
    args = argparse.Namespace(**{**FLASH, "flash_attn": True}, use_flash_attn=True, use_sage_attn=False)
    translate_lumina(args)
    assert not hasattr(args, "typed_names")
