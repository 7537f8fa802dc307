"""Clips: reading, holding and writing videos."""
