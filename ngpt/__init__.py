"""ngpt: pretrain LLaMA models in a fraction of the memory, with Natural GaLore."""

__version__ = "0.1.0"
