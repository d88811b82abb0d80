"""Pack documents into rows, in an order that depends on nothing but the settings."""
