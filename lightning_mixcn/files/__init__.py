"""Write output atomically, read and write safetensors, find a model's folder."""
