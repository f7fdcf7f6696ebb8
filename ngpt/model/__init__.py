"""The LLaMA decoder: what it computes (llama, attention, layers), what it minimises (loss), what it costs (cost)."""
