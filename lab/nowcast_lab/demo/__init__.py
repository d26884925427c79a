"""``nowcast demo``: one training three times, alone and nowcast, and what came of it."""
