"""Reading base models: which tensors are experts, what shape they have, and filling the engine's memory with them."""
