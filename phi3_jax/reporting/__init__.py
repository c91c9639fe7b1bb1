"""What a study found: a table of its runs, figures, and one self-contained page (no jax)."""
