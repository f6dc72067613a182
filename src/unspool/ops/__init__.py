"""Numeric kernels: attention backends, rotary embedding, norms, and what torch.compile fuses of them."""
