"""Models that hold MoE layers: find them, load, save and cost them."""
