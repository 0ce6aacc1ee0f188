"""lit_jax: linear diffusion transformers (LiT, arXiv 2501.12976) in JAX."""
