"""What is seen inside a network: the experiments of the registers paper and of the decoupling paper."""
