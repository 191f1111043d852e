"""Whole lives of agents on the production scheduler: a virtual clock, one seed, faults composed in text."""
