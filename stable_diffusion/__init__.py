"""Stable Diffusion 1.x, 2.x and XL in gen_img.py: read run.py first, then making.py.

asking: requested pictures: variants, seeds and numbers settled
assembling: load the checkpoint and all that acts on it
chunks: cut a text's tokens into chunks for the encoder
clip_vision: a picture's vector in place of the pooled state
contract: records that the parts hand to each other
control_net: add to the U-Net's features after guide images
control_net_files: files of ControlNets: recognise, translate, load
control_options: options of ControlNets, LLLites, CLIP and VGG16
deep_shrink: smaller inner features early in denoising
files: names of written pictures, and texts in them
folders: folders in the layout of diffusers
gradual_latent: latents that begin small and grow
guiding: CLIP and VGG16 steer the predicted picture
highres: two stages: a small picture, then full size
kinds: which Stable Diffusion a checkpoint is, by tensor names
lines: lines of prompts, and where they come from
lllites: ControlNet-LLLites in the U-Net during a batch
loading: load a checkpoint: kind, networks, tokenizers
loras: LoRAs folded into weights, or added at run time
making: A batch of pictures: texts, start, the denoising loop, pixels
model_options: options of the checkpoint and of how it is loaded
model_upscaler: enlarge the first stage with SwinIR or ESRGAN
network_options: options of LoRAs and their like
options: all options of gen_img.py
passes: one call of the U-Net, and classifier-free guidance
pixels: pictures to latents and back, by the autoencoder
preparing: guide images: read, resize and prepare
prompt_lines: prompt lines: `a cat --n ugly --w 512`
prompt_options: options of prompts, input pictures, seeds, texts and output files
regions: parts of a prompt, each in its own region
run: from prompts to pictures, batch by batch
samplers: diffusers' schedulers as solvers of the loop
sampling_options: options of sampling: sampler, guidance, noise, sizes
shrink_options: options of pictures that begin small
starting: start of denoising: noise, picture or masked picture
text: encode prompts: weights, chunks, pooled state
text_checkpoints: CLIP-L and OpenCLIP encoders of a checkpoint
textual_inversion: words that stand for learned vectors
tokenizers: find the tokenizers of the text encoders
unet_checkpoints: the U-Net of a file: dimensions and filling
vae_checkpoints: the VAE of a checkpoint: names, dimensions, network
"""
