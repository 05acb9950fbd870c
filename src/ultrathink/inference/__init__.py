"""Text generation: sampling, streaming, stop texts."""
