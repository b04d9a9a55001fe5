"""Images or clips in a folder, with captions and other companions in files named like them.

`dataset/listing.py` lists them: it is what every dataset may have.
"""

from dataset.forms.contract import DataForm


class Folders(DataForm):
    """Files in a folder."""

    name = "folders"
    source = "directory"
    shared_keys = (
        "class_tokens",
        "control_directory",
        "reference_directory",
        "control_mask_directory",
        "worse_directory",
        "mask_directory",
        "audio_directory",
        "reference_audio_directory",
        "keyframe_guide_directory",
        "keyframe_guide_extra_directories",
        "latent_idx_guide_directory",
        "multiple_target",
    )
    is_listed_in_training = True
    has_caches_of_others = True


FOLDER = Folders()
