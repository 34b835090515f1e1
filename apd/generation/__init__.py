"""The face of transformers' `generate()`: arguments in, tokens, text and traces out."""
