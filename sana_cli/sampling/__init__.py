"""From a transformer and caption states to pictures: its pipeline, the sampling loop, files."""
