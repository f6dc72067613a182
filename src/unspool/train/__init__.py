"""Training: a recipe becomes a loop that can be stopped at any moment and continued to the same bits, on one process or
under torchrun. Objectives come from `methods`, clips from `data`; evaluation arrives as callbacks."""
