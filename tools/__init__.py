"""Programs that make what the project ships: its model, its generated pages, its checks."""
