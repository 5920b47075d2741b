"""Tokenizers of the GLM generations; prompts are built from ids, one segment at a time."""
