"""Tools and options around generation: guidance, previews, prompts, step caches, metadata.

GIMMVFI: command: add pictures between a video's pictures
facefix: command: restore faces with GFPGAN or CodeFormer
guidance: choose the passes of each step, combine their velocities
guidance_checks: find impossible or useless guidance before anything loads
guidance_formulas: formulas of guidance, each made a `GuidanceStage`
guidance_options: options of classifier-free guidance besides its scale
guidance_passes: passes of a step, and stages that combine them
guidance_steps: at which steps guidance runs, and how strongly
latent_preview: show a clip in a file while it is denoised
metadata: `bt_*` texts in latent files, pictures and videos
metaview: command: show how files say they were made
model_utility: command: inspect model files, and write them anew
model_utility_options: options of model_utility.py: file and result
model_work: the work of model_utility.py: inspect, write anew
nag: normalised attention guidance away from a second text
nag_options: options of normalised attention guidance
preview_options: options of previews during generation
prompt_options: options of changes to prompts before encoding
prompt_rewrite: a chat model turns requests into full descriptions
prompt_rewrite_options: options of prompts that a chat model writes anew
prompt_weights: weights for parts of a prompt: `a (red:1.4) car`
riflex: RIFLEx: keep long videos from repeating themselves
steadier_options: options of videos longer than the model's training
step_cache: from options of a request to a step cache
step_cache_options: options of step caches, which skip similar passes
taehv: TAEHV: a tiny decoder of latents for previews
upscaler: command: enlarge with SwinIR or an ESRGAN network
video_to_png: command: write the frames of a video as PNG
video_to_video: start denoising from noisy latents of a video
video_to_video_options: options of starts: another video, image or latents
wildcards: `__color__` in a prompt takes a line of color.txt
yolo_blur: command: blur faces or other detected things
"""
