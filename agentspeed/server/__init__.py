"""Sessions over HTTP: the endpoints that OpenAI's and Anthropic's clients speak, over one engine and its sessions."""
