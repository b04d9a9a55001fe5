"""The caching loop and its two halves.

precomputed: moments and embeddings that other programs computed
latents: from a source to entries: decode, batch, encode, write
loop: encode media and captions; run the commands
on_ray: cache on a Ray cluster, by shards of the work
planning: cache files of a source, and which are valid
prefetch: work ahead in threads; report what was done
audio: encode the audio of clips whose latents are cached
taking_over: latents that another model has cached equally
text_plans: text caches: valid, unfinished and missing outputs
texts: encode the captions without a valid text cache
work: encode the items without a valid latent cache
"""
