"""Other people's message lists as the SDK's messages, and back: one module for each format."""
