"""The exact engine: NiNo without a hidden vector per edge."""
