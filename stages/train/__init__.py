"""The training that distillation and fine-tuning share: loss, optimizer, average, checkpoints, validation, journal."""
