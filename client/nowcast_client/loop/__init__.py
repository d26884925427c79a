"""What happens between the steps of a training: counting, windows, asking, patching, judging, reporting."""
