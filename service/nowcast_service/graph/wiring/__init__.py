"""From a spec to the blocks of its neural graph."""
