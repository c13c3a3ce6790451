"""The mathematics: paths, times, the bridge from a discrete teacher, solvers; no network and no disk."""
