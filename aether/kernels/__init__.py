"""Pure functions on arrays: the ⵟ-product, attention, rotary positions."""
