"""Aether: the training stack for ⵟ networks."""
