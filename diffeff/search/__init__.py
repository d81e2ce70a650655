"""Searches: what methods need to know of one model and its settings, found by running it, never by training it."""
