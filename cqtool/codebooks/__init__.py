"""Codebooks: fitting them (k-means), and encoding and decoding with them."""
