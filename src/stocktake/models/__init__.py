"""Models: each is a network from photos to one logit a quantity."""
