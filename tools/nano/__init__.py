"""The shipped model: its tasks, its training, its scores."""
