"""Methods that change what classifier-free guidance costs."""
