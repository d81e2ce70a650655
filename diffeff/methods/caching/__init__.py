"""Caches: clock x site x policy (with its indicator) x predictor. A new cache configures these or adds one of them."""
