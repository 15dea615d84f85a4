"""Evaluation: scores of a model on texts or images, and runs loaded from their folder."""
