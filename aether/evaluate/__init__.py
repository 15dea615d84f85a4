"""Evaluation: scores of a model on text, and runs loaded from their folder."""
