"""The UNet: what inflation makes of it, what is tuned in it, and what is put onto it."""
