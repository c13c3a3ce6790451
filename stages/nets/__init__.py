"""Networks as they come from diffusers folders: the frozen teacher, the student, and a tap on their blocks."""
