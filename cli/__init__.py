"""The command `tav`, one file a command."""
