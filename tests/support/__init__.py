"""What tests and benchmarks share: clients, stand-ins, checkpoints, recorded runs."""
