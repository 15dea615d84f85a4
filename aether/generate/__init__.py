"""Text from a trained model: sampling, decoding with a key/value cache, streaming."""
