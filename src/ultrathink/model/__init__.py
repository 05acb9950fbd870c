"""The network: a decoder of the Llama family in plain PyTorch, without files or processes."""
