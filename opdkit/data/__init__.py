"""Data sets: rows from files, the hub or reasoning-gym, as prompts in token ids, in a resumable
order.
"""

from opdkit.data.load import load_rows
from opdkit.data.prompts import Prompts
from opdkit.data.stream import PromptStream

__all__ = ["PromptStream", "Prompts", "load_rows"]
