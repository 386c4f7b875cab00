"""The PyTorch side of jaxmask: what Transformers' masks mean, in PyTorch, and the comparison of both, bit for bit."""
