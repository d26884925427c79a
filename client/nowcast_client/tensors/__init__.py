"""The network's tensors: how they lie, snapshots of them, patches to them."""
