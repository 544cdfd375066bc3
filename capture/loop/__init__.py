"""The closed loop: a running model whose attention is a method."""
