"""Describe the subcommands of ``mixcn``, and run them in this process or in one of their own. Imports no torch."""
