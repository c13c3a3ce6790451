"""One page about runs: what was trained from what, whether it worked, its pictures, its curves and its verdicts."""
