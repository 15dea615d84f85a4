"""Texts and images from disk to batches: NumPy, PIL and Grain, never JAX."""
