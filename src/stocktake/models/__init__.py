"""Floor 2: every rung of the ladder is a network from photos to one logit a quantity."""
