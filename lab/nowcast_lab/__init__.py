"""Applications of the client and the service together: meta-training, evaluation, the demo. Nothing imports it."""
