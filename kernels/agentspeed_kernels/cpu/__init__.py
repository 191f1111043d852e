"""CPU kernels: portable ones on torch, and native ones for a few rows, where torch stays far from memory speed."""
