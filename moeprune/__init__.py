"""Inference-time expert pruning of Soft Mixture-of-Experts models."""

__version__ = "0.1.0"
