"""Methods that change which tokens an attention or block works on."""
