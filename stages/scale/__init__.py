"""What a cache and a training cost on rented GPUs, computed before any is rented."""
