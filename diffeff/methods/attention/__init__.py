"""Methods that change how an attention is computed, not what it computes on."""
