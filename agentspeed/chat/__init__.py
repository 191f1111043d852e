"""The session's text: template, tokeniser, parser, and the mirror of every id."""
