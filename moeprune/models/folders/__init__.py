"""Folders of transformers: the MoE layers in them by the names of tensors, and the models that they hold."""
