"""Looking at adapters, comparing them, and making smaller ones of them or of tuned models."""
