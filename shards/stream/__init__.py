"""Which samples of a cache come, and in which order: functions of the sample number, without a state."""
