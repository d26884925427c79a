"""Training frameworks: each module only attaches the hook, and is imported by whoever uses that framework."""
