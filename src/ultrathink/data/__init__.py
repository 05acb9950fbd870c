"""From text to batches: sources, tokenizers, the token cache, the order of samples, loaders."""
