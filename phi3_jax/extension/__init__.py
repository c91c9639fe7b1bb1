"""A longer window for a trained model: lists of RoPE factors, their search, and what is made of them."""
