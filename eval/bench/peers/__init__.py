"""One adapter per peer: how to switch it on and off on a diffusers pipeline."""
