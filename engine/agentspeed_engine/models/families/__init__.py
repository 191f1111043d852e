"""One folder a family: configuration, shapes, and the chain of modules."""
