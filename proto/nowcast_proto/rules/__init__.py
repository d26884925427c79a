"""Rules the training side, the service and the evaluation must apply alike; numpy only."""
