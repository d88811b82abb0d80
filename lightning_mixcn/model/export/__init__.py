"""Write what transformers, PEFT, vLLM and llama.cpp load."""
