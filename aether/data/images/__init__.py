"""Pictures by class: where they come from, how they are decoded and augmented; NumPy and PIL, never JAX."""
