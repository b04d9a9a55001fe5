"""Names of a model's inputs other than the prompt: where a video starts from, and what a teacher sees."""

# the options of a request that name the starting point of a video, which has at most one of them
VIDEO, IMAGE, LATENTS = SOURCES = ("video_path", "i2i_path", "from_latent")

# what a teacher knows beyond the network (--teacher_sees); all but the first are values of
# `Batch.condition_set`
INPUTS, FIRST_LAST, CLIP, SUBJECT = "inputs", "first_last", "clip", "subject"
