"""Time to target: trainings with and without nowcasts, compared."""
