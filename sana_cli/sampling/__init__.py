"""From a transformer and caption states to pictures: what stands around it, the loop, the files."""
