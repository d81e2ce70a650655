"""Published caches, each a few lines of configuration on the core, with its source and where ours differs."""
