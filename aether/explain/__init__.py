"""What a trained network's ⵟ units are and do: attribution, prototypes, capacity, distances, surgery."""
