"""Train pieces of another language and merge them into a tokenizer: ``mixcn vocab``."""
