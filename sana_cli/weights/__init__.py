"""A transformer's weights: our own checkpoints, and other people's files in diffusers' form."""
