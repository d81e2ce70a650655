"""Methods that lower the memory of activations and decoding."""
