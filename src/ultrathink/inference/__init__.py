"""Text from a model: sampling, streaming, stop texts."""
