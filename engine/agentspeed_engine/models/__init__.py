"""From a model folder to logits: families, weights and the paged latent cache they write."""
