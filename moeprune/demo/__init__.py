"""The story on shipped checkpoints, and the training that made them."""
