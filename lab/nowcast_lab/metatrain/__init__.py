"""Meta-training: collect trajectories, train, evaluate time-to-target."""
