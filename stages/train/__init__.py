"""The training loop that distillation and fine-tuning share: losses, optimizer, average, checkpoints, journal."""
