"""How a plan's tensors get into the model that SGLang built, and the proof that they did."""
