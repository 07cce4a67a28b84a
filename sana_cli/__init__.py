"""Train and run SANA, the linear-attention text-to-image diffusion transformer (arXiv 2410.10629)."""

__version__ = "0.1.0"
