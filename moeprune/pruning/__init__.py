"""Choose experts, fit what compensates for the others, and apply both."""
