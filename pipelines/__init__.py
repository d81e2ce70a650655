"""Ready workflows that need a loop of their own, built on methods."""
