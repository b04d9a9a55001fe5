"""Commands that pages start: the queue, processes beside it, renderings, and what they print."""
