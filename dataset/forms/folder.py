"""Images or clips in a folder; captions and other companions are in files with the same names.

`dataset/listing.py` lists folders, because any program with a dataset needs that.
"""

from dataset.forms.contract import SourceFormat


class Folders(SourceFormat):
    """Source format of tables that read their media files from a folder."""

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
    shares_caches_with_other_programs = True


FOLDER = Folders()
