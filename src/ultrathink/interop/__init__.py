"""Import and export of models and tokenizers as Hugging Face folders."""
