"""Handing adapters on: by name, by address, as a folder for a hub, as a bundle with its clip."""
