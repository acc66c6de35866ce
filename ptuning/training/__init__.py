"""What happens around a training step: memory, resuming, signals, shards, logs, and the watch over a run."""
