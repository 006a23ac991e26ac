"""Run data through a model and keep sums."""
