"""One MoE layer: its maths, weights, execution and surgery."""
