"""The fast path of quantised networks on a CPU: a decoding step runs all blocks in one call of the kernels
(`decode_blocks.py`), and prompts have their own attention (`prompt_attention.py`).

Networks describe their blocks (`block_plan.py`) and try this path first; where it does not apply, their modules run.
"""

from .block_plan import BlockLayout, BlockParts
from .decode_blocks import BlockRunner, sees_all
from .prompt_attention import attend

__all__ = ["BlockLayout", "BlockParts", "BlockRunner", "attend", "sees_all"]
