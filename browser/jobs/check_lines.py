"""Patterns of the lines that checks of datasets and model files print, for `browser/jobs/printed_lines.py`.

A placeholder %(name)s matches any text. If several patterns match a line, the first one is used.
"""

from modules.pages.language import say

# kinds of errors with their count, in the plural; the singular is derived from it
FAULTS = (
    say("%(n)s have no caption"),
    say("%(n)s cannot be read"),
    say("%(n)s cannot be used"),
    say("%(n)s have an empty caption"),
    say("%(n)s have a caption that is not UTF-8"),
    say("%(n)s have a caption that cannot be used"),
    say("%(n)s have a caption longer than %(name)s reads"),
    say("%(n)s folders have files that are not used"),
    say("%(n)s folders are not searched"),
    say("%(n)s are transparent and filled with white"),
    say(
        "%(n)s have frames of several sizes: those of a different shape than the first are cropped to its "
        "shape"
    ),
    say("%(n)s give no item"),
    say("%(n)s give no item of some lengths"),
    say("%(n)s are HDR, and their brightness is not converted: they look pale. Convert them to SDR first"),
    say("%(n)s are animated: only the first frame of each is used. Tables of clips learn all of them"),
    say("%(n)s are interlaced, which is not undone: what moves is torn into lines. Deinterlace them first"),
    say("%(n)s are black"),
    say("%(n)s do not move"),
    say("%(n)s are blurred"),
    say("%(n)s are nearly the same as another"),
    say("%(n)s have no sound"),
    say("%(n)s have sound that cannot be read"),
    say("%(n)s have sound that does not fit"),
    say(
        "%(n)s have sound that is not cached: only their pictures are learned until latents are cached again"
    ),
    say("%(n)s have no cache: too short, unreadable, or not cached yet"),
    say("%(n)s have no reference image, while others have"),
    say("%(n)s have a reference image that is equal to the image: an edit that changes nothing is learned"),
    say("%(n)s have no reference, while others have"),
    say("%(n)s have no control mask, while others have"),
    say("%(n)s have numbered files of which one is missing: the others are used in their order without it"),
    say("%(n)s tables have no item to train on"),
    say("%(n)s tables cannot be used"),
    say("%(n)s tokenizers are missing, and nothing is downloaded while HF_HUB_OFFLINE is set"),
    say("%(n)s model that uses reference images gets none"),
    say("%(n)s word to learn is not in all captions"),
    say("%(n)s faults in captions as JSON objects"),
    say("%(n)s text caches are missing"),
    say("%(n)s text caches are unfinished"),
    say("%(n)s caches may be incomplete"),
    say("%(n)s shards or folders are incomplete; caching repairs them"),
    say("%(n)s folders of caches are in the other form"),
    say("%(n)s masks are all black: nothing in their images is trained on"),
    say(
        "%(n)s masks are so thin that none of their latents lies above %(share)s: --expand_pixels "
        "of tools/mask.py"
    ),
    say("%(n)s masks belong to nothing by their names, and are not read"),
    say("%(n)s captions have a brace that belongs to no {a|b}, and learn it as text"),
    say(
        "%(n)s captions have {a|b}, which is learned as text: only enable_wildcard = true of a "
        "[[datasets.subsets]] draws one of them"
    ),
    say(
        "%(n)s captions have a backslash before a bracket, which is learned; prompts in which brackets "
        "are weights omit it. Remove the backslashes"
    ),
    say(
        "%(n)s captions are JSON objects, which shuffle_caption, caption_tag_dropout_rate and "
        "token_warmup_step take apart. Omit these keys"
    ),
    say(
        "%(n)s clips have a rate far from that of the model; source_fps = %(auto)s plays them at their speed"
    ),
    say("%(n)s clips have a different rate than source_fps says; write source_fps = %(auto)s"),
    say(
        "%(n)s control clips or masks differ from their clips in number of frames and duration; their "
        "frames at the clip's times are taken, and their last frame after their end"
    ),
    say(
        "%(n)s folders of frames have another order by the numbers in their names than by the names as "
        "texts; the numbers count"
    ),
    say("%(n)s files are references of several images, of which the model takes only the first"),
    say("%(n)s problems with the layers of %(name)s"),
    say("%(n)s problems with the sound of %(name)s"),
    say("%(n)s problems with the control media of %(name)s"),
    say("%(n)s problems with %(key)s of %(name)s"),
    say("%(n)s images of %(name)s cannot be opened"),
    say("%(n)s videos of %(name)s cannot be opened"),
    say("%(n)s names of %(name)s are not UTF-8, so that no cache can name them; rename the files"),
    say("%(n)s names of %(name)s are too long for the names of their caches; rename the files"),
    say("%(n)s rows of %(name)s repeat another one and would share a cache file; take them out"),
    say("%(n)s pairs of %(name)s would share a cache file; rename one of each, or use two tables"),
)
# these come before the patterns of `new`, one of which would match them too
UNREAD_LINES = (
    say("%(folder)s: %(n)s files are not read: %(kinds)s"),
    say("%(folder)s: 1 file is not read: %(kinds)s"),
)
# whole lines
CHECK_LINES = (
    say("%(file)s: no %(caption)s next to it"),
    say("%(folder)s has %(n)s control images for %(name)s; needed: %(needed)s (or another image type)"),
    say("%(folder)s: its masks are not used. %(key)s in the table of %(name)s uses them"),
    say("%(folder)s: its images are not used: folders inside a folder are not searched. Give it a table"),
    say("%(folder)s: its videos are not used: folders inside a folder are not searched. Give it a table"),
    say("Nothing is wrong. Remarks above: %(remarks)s."),
    say("Something is wrong: see above. Faults: %(faults)s. Remarks above: %(remarks)s."),
    say("Something is wrong: see above. Faults: %(faults)s."),
    say("Fix the problems listed above in the folder %(folder)s, then run this again."),
    say("Missing captions are written by a model (%(model)s, %(size)s to download), in that folder:"),
    say("or add %(key)s to the table in dataset.toml: a made-up word in their place."),
    say("%(part)s: fingerprint %(digest)s"),
    say("tokens of %(name)s are not counted: %(reason)s"),
    say("tokens of captions are not counted, which is not an error: %(reason)s"),
    say("Tokens are counted by --check --html of the text caching script."),
    say("Pass %(option)s the folder %(folder)s of %(repository)s (or its tokenizer.json or spiece.model)."),
    say("dataset.toml, [[datasets]] %(table)s: %(images)s"),
    say("%(size)s: %(items)s x %(repeats)s, %(batches)s of %(batch)s"),
    say("%(n)s of %(total)s have a mask; the others are used completely"),
    say("text caches of %(name)s: about %(size)s, that of the longest caption %(longest)s"),
    say("An epoch: %(items)s with repeats, %(batches)s, %(steps)s"),
    say("For validation: %(items)s"),
    say("Caches are made by:"),
    say("reference images: %(counts)s"),
    say("pairs of a better and a worse one: %(n)s"),
    say("nearly the same as %(name)s and %(n)s more"),
    say("nearly the same as %(name)s"),
    say("%(table)s: none of its %(media)s yields an item"),
    say("... and %(n)s more"),
    say("Training on all of it: %(batches)s an epoch, as many steps without accumulation"),
    say(
        "Training on it, without %(items)s for validation: %(batches)s an epoch, as many steps without "
        "accumulation"
    ),
    say("%(file)s is empty (0 bytes)"),
    say("%(file)s is not an image that can be read, or it is damaged"),
    say("%(file)s: read as %(encoding)s"),
    say("Pass the checkpoint of a transformer to %(option)s."),
    say(
        "Pass a checkpoint of Stable Diffusion 1.x, 2.x or XL: one file with U-Net, VAE and text "
        "encoders, or a folder in the layout of diffusers."
    ),
    say("%(option)s %(path)s has no U-Net, no VAE, no text encoder; it looks like %(file_kind)s."),
    say("%(path)s is not %(wanted)s; it looks like %(file_kind)s."),
    say("%(option)s %(path)s has no %(missing)s; it looks like %(file_kind)s."),
    say("Pass %(files)s to %(option)s."),
    say("it looks like %(file_kind)s"),
    say(
        "it is %(file_kind)s for --task %(of_file)s (their files have the same tensors). Its scripts are"
        " %(scripts)s; for `new` %(families)s"
    ),
    say("it is %(file_kind)s for --task %(task)s. Its scripts are %(scripts)s; for `new` %(families)s"),
    say(
        "It is a Git LFS pointer, a short text file instead of the model. Run git lfs pull in its folder, "
        "or download the file itself."
    ),
    say(
        "It is a web page, not a model: the site may have asked for a login. Log in and download the "
        "file again."
    ),
)
# parts of lines
CHECK_LINE_PARTS = (
    say("captions of no image"),
    say("captions of no video"),
    say("no tokenizer for %(path)s: there is none next to it or inside it, and the hub's cache has none"),
    say("%(n)s batches"),
    say("1 batch"),
    say("%(batch)s (the last has %(last)s)"),
    say("%(n)s videos"),
    say("1 video"),
    say("1 step"),
)
# names of kinds of model files (from checkpoints/kinds.py, and `MARKS` of the families)
FILE_KINDS = (
    say("%(what)s, which is not supported yet, in diffusers layout"),
    say("%(what)s, which is not supported yet"),
    say("%(what)s, which is not supported: use v1.3 or v1.4"),
    say("%(what)s, which is not supported"),
    say("%(what)s, a different network than %(other)s's"),
    say("%(what)s, without Anima's adapter"),
    say("a VAE of LTX-Video or LTX-2; LTX-Video is not supported yet"),
    say("a ControlNet in diffusers layout; one of FLUX.1 is for flux_train_network.py"),
    say("%(what)s (of LTX-2: %(option)s)"),
    say("%(what)s (next to a T2V --dit of Wan)"),
    say("%(what)s (--vace, next to a T2V --dit of Wan)"),
    say("%(what)s (%(option)s, or next to GFPGAN)"),
    say("%(what)s (next to GFPGAN)"),
    say("%(what)s (--dit, with --model_version layered)"),
    say("%(what)s (%(of_file)s's %(option)s)"),
    say("%(what)s (%(option)s)"),
    say("%(what)s in diffusers layout"),
    say("%(what)s, a part of its text encoder"),
    say("%(what)s, a part of its %(whole)s"),
    say("%(what)s, of %(n)s channels"),
    say("%(of_file)s, a language model that draws"),
    say("%(what)s, a tiny decoder for previews"),
    say("%(what)s, which finds the parts of a face"),
    say("%(what)s, which interpolates with %(flow)s"),
    say("%(what)s, the optical flow of %(of_file)s"),
    say("a ControlNet of %(of_file)s, such as %(name)s"),
    say("a ControlNet of %(of_file)s"),
    say("the upscaling transformer of %(of_file)s"),
    say("the transformer of %(of_file)s"),
    say("a transformer of %(of_file)s"),
    say("a pruned %(of_file)s transformer"),
    say("a %(of_file)s transformer"),
    say("an %(of_file)s transformer"),
    say("a transformer"),
    say("a latent upscaler of %(of_file)s"),
    say("the vocoder of %(of_file)s"),
    say("the connectors of %(of_file)s"),
    say("the VAE of %(of_file)s"),
    say("the autoencoder of %(of_file)s"),
    say("the %(of_file)s VAE"),
    say("a VAE of another model"),
    say("a VAE of %(of_file)s"),
    say("a VAE for images"),
    say("a %(of_file)s VAE"),
    say("%(of_file)s's video VAE"),
    say("%(of_file)s's audio VAE"),
    say("%(of_file)s's adapter"),
    say("a %(of_file)s image encoder"),
    say("a %(of_file)s text encoder"),
    say("a %(of_file)s encoder"),
    say("an %(of_file)s encoder"),
    say("the blocks of VACE alone"),
    say("a %(of_file)s language model"),
    say("a language model"),
    say("a %(of_file)s model"),
    say("a %(of_file)s checkpoint"),
    say("the U-Net of %(of_file)s"),
    say("a compact %(of_file)s upscaler"),
    say("an %(of_file)s upscaler with old names"),
    say("an %(of_file)s upscaler"),
    say("a %(of_file)s upscaler"),
    say("a %(of_file)s face restorer"),
    say("a %(of_file)s face detector"),
    say("the first GFPGAN"),
    say("a ParseNet"),
    say("a TAEHV"),
    say("%(of_file)s or of %(what)s"),
    say("%(of_file)s or %(what)s"),
    say("HunyuanImage's refiner"),
)
FAULT_LINE = say("%(fault)s:")
UNREAD_FILES = say("%(files)s: %(why)s")
UNKNOWN_FILE = say("a file of no model that is known here")
