"""The libraries whose Soft MoE checkpoints and layers are known, a file each."""
