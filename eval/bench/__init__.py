"""`diffeff bench`: plans, peers and fewer steps, taking turns in one run."""
