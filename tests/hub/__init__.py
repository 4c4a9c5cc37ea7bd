"""A Hugging Face Hub on loopback; tests take it from `hub_server`."""
