"""One function of attention over a table of back ends.

attend: the only entry: looks up the back end
lengths: batches of different lengths, without computing padding
options: options that choose the kernels of attention
packages: attention by optional packages
sdpa: torch's scaled_dot_product_attention, with the best kernels
second_text: steer attention away from a second text
"""
