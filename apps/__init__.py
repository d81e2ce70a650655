"""Interfaces on top of the toolkit: web UI and ComfyUI nodes."""
