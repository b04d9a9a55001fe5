"""What a model family tells the shared loops: start reading here.

data: records of caches, datasets and encoders
experts: networks of one model that share noise levels
family: the contract between a model family and the shared loops
generation: records of requests, sections and network calls
guidance: a model's guidance beside the usual formula
loading: where and how a network's weights are placed
moments_maker: a VAE with text encoders, for prepared clips
noise: how noise is mixed in, and timesteps
npz: npz caches that image trainers write
prepared: a request that a family has settled
release: where a model comes from, for licence and card
requests: check a request and fill in its defaults
source: start of denoising from video, image or latents
step_cache: records of skipped passes in a request
steps: one step of the denoising loop, for guidance
tokens: how an encoder reads a text: counts, cut, weights
weighting: weights of a prompt's parts, on encoder outputs
"""
