"""What runs train: adapters, the gradients their members collect, and the tensors that travel in and out."""
