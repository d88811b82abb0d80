"""Load and check tokenizers; read and write SentencePiece models."""
