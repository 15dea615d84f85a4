"""Text from disk to batches: numpy and grain only, never JAX."""
