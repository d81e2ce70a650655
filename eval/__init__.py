"""Measuring: fidelity, comparison with plain diffusers, benchmarks."""
