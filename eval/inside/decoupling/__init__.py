"""What CLS is made of: the experiments of the decoupling paper (Lappe and Giese 2025, arXiv 2505.05892)."""
