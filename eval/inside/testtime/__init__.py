"""Registers for a network that was trained without, added afterwards (Jiang et al., arXiv 2506.08010)."""
