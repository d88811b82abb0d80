"""Find, read and unpack the documents of sources."""
