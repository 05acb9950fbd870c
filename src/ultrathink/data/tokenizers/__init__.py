"""Text to token ids and back; ``config.tokenizer`` registers each tokenizer by name."""
