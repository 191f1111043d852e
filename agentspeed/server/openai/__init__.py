"""The endpoints that OpenAI's clients speak."""
