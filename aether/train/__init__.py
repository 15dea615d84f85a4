"""Training: optimizer, state, step, loop, and what a person sees."""
