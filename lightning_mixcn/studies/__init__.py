"""What is studied about an adapted model beyond its loss. Nothing here knows a trainer."""
