"""What a client and an engine say to each other: messages, their frames, codes of refusals, ids; free of torch."""
