"""Stable Diffusion 1.x, 2.x, XL. Read run.py, then making.py for gen_img.py; family.py for the loops.

asking: requested images: variants, seeds and numbers settled
assembling: load the checkpoint and all that acts on it
attention: a U-Net's attention by the back end of training
beside_unet: what stands next to a U-Net and sees its calls
checkpoints: U-Net and VAE of a file: dimensions and names
contract: records that the parts hand to each other
control_net: add to the U-Net's features after guide images
control_net_files: files of ControlNets: recognize, translate, load
control_net_learning: a ControlNet in training: a copy of the U-Net's half
control_net_options: options of training a ControlNet
diffusers_parts: classes of diffusers, imported when they are called for
family: the description that the shared loops call
files: which Stable Diffusion a checkpoint is, by tensor names
folders: folders in the layout of diffusers
generation_options: options of sd_generate_image.py and sdxl_generate_image.py
guiding: CLIP and VGG16 steer the predicted image
highres: two stages: a small image, then full size
inpainting: further inputs of U-Nets for inpainting
inversion_learning: vectors of a new word in training, and their files
inversion_options: options of training textual inversion
latent_upscaler: enlarge the first stage with sd-scripts' latent upscaler
lines: lines of prompts: options, variants, where they come from
lllite_learning: a ControlNet-LLLite in training
lllite_modules: the small networks of ControlNet-LLLite, and their names
lllites: ControlNet-LLLites in the U-Net during a batch
layer_texts: states of texts for each cross-attention of the U-Net (XTI)
loading: load a checkpoint: kind, networks, tokenizers
loras: LoRAs folded into weights, or added at run time
making: A batch of images: texts, start, the denoising loop, pixels
minimal_inpainting: repaint by the options of sd-scripts' small script
minimal_options: these options, and the same for gen_img.py
model_upscaler: enlarge the first stage with SwinIR or ESRGAN
names: what it is called everywhere, from scripts to tensors
noise: the schedule that is trained, varied noise, loss factors
network_options: options of LoRAs, ControlNets, and networks that steer
options: all options of gen_img.py
released_names: names of released files for parts of folders
regions: parts of a prompt, each in its own region
resnets: norms and residual blocks with fewer kernels
run: from prompts to images and files, batch by batch
samplers: diffusers' schedulers as solvers; calls of the U-Net
sampling_options: options of sampling, and of images that begin small
sd1/: scripts that train 1.x and 2.x
sdxl/: scripts that train Stable Diffusion XL
small_start: features or latents that begin small and grow
starting: images to latents and back; start of denoising
text: encode prompts: weights, chunks, pooled state or image
text_checkpoints: CLIP-L and OpenCLIP encoders of a checkpoint
textual_inversion: words that stand for learned vectors
tokenizers: tokenizers of the text encoders, and chunks of tokens
towers: text encoders that caption images, and may learn
training_files: the checkpoint of a training, network by network
training_options: options of training and of its caches
whole_files: write a whole checkpoint after a training
whole_folders: write it as a folder in diffusers' layout
whole_options: options of training a whole checkpoint
workflow: the nodes of ComfyUI that make its samples
"""
