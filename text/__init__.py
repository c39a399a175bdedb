"""Text to token files: tokenizers, sources, preparation, examples for fine-tuning."""
