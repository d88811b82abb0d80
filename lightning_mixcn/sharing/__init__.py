"""Show a run to others: a page that needs nothing else, and a repository on the Hugging Face hub."""
