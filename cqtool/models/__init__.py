"""Opening models, and knowing one from another."""
