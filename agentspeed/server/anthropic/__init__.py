"""The endpoints that Anthropic's clients speak."""
