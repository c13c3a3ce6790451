"""The model hub: repositories, snapshots for an upload, and the thread that sends them beside the training."""
