"""Text from a run: templates, patterns, prompts, and the loops that fill them."""
