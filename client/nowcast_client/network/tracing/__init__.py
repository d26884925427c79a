"""From one forward pass to neurons: recorded operations, labels of axes, rules of operations, explicit wiring."""
