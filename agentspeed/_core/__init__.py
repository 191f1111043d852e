"""What session, turn, run, fork and snapshot share; nothing here is public."""
