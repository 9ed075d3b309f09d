"""Features that several tasks are built on: states of class tokens, and likelihoods of masked words."""
