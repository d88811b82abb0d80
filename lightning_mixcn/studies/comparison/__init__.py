"""Train the arms of a recipe on the same bytes of text: ``mixcn compare``."""
