"""``nowcast demo``: one training four times, alone, nowcast and with the strongest recipe, and what came of it."""
