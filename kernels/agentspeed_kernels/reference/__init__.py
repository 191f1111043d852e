"""Definitions of every op in float64: slow, obvious, and what the conformance suite measures the others against."""
