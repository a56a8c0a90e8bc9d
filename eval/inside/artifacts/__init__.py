"""Tokens that stand out: which, where, since which layer, and what is in them (registers paper, sections 2 and A)."""
