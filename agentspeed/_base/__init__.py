"""What every layer of the SDK may import; nothing here is public."""
