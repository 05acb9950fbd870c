"""Models and tokenizers of others: Hugging Face folders read and written."""
