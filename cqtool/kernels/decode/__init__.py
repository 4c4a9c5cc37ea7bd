"""Attention of a few query tokens over codes, sinks and recent tokens."""
