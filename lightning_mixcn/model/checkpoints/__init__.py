"""Read and write model folders: files, names of tensors, identity of a base."""
