"""Methods that change the sampler: which timesteps are computed, and how the latents are moved between them."""
