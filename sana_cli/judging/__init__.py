"""How good pictures are: a classifier that reads them, and plots of the results."""
