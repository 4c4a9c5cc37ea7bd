"""The whole way from a model to a verified release, as one piece of work that can be repeated."""
