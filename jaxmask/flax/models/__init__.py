"""Reference models: a decoder of the Llama family, an encoder of the BERT family, and generation."""
