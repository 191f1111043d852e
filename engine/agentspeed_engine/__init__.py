"""The session-aware engine: it sees token ids only, never text."""
