"""Exhaustive search over the production ownership machines and scheduler at small bounds."""
