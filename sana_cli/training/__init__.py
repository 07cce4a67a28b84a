"""How weights move: objective, batches, optimizer, and what a run records of itself."""
