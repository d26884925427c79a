"""What the service does whoever asks: sessions, budgets, the device queue."""
