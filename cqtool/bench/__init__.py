"""What `cqtool bench` runs: kernel times, whole models with random weights, peak memory."""
