"""How a quantised network runs faster on a CPU than through its modules: decoding steps take all blocks in one call of
the kernels (`decode_blocks.py`), prompts have their own attention (`prompt_attention.py`).

Networks describe their blocks (`block_plan.py`) and ask; where the path does not apply, they go on with their modules.
"""

from .block_plan import BlockLayout, BlockParts
from .decode_blocks import BlockRunner, sees_all
from .prompt_attention import attend

__all__ = ["BlockLayout", "BlockParts", "BlockRunner", "attend", "sees_all"]
