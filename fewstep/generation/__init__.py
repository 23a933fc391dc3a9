"""From requests to images: text encoders, the few-step sampler, engines, and the batcher before them."""
